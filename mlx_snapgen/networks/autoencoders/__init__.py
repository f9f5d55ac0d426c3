"""Autoencoders: pictures in [-1, 1] to normalised latents and back."""
