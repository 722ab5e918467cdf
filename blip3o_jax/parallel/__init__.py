"""Placement: the mesh, the processes, and where parameters, batches and activations lie."""
