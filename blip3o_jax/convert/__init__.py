"""PyTorch <-> JAX: one table of names per component, and the functions that apply it in either
direction."""
