"""Supervised training: configuration, losses, one step, and the loop around them."""
