"""From records on disk to batches of numpy arrays on this host."""
