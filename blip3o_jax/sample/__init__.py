"""Text to image: tokens, then latents, then pixels."""
