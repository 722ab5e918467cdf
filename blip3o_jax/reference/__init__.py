"""PyTorch's side of comparisons; the only room that imports torch (extra [parity])."""
