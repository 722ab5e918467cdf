"""Reinforcement learning: GRPO on the transformer, pictures drawn by the frozen diffusion part
(docs/model.md §7; paper section 4)."""
