"""What the commands do: read inputs, wire the rooms together, write results."""
