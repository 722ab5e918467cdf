"""What the commands do: each job reads its inputs, wires the rooms together and writes its results.

Imported only when it is run.
"""
