"""Large public flow models that a small one can learn from, behind one interface.

A teacher is a folder that `python -m convert.teacher` writes. Module names are the public ones, so
that public LoRAs find their layers.
"""
