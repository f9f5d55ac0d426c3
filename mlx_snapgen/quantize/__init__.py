"""Fewer bits: quantization in memory, palettes, and which layers are sensitive."""
