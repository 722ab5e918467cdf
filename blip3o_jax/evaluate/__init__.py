"""Scores of a checkpoint on held-out prompts."""
