"""Reinforcement learning: GRPO on the transformer, pictures drawn by the frozen diffusion part (spec S7; paper section 4)."""
