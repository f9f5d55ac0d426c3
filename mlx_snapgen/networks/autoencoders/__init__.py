"""Autoencoders: pictures in [-1, 1] to normalized latents and back."""
