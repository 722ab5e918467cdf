"""PyTorch <-> JAX: one table of names per component, applied in either direction."""
