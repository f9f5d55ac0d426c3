"""Quantization in memory, palettes, and the choice of bits by sensitivity."""
