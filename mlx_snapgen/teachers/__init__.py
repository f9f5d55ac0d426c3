"""Public flow models behind one interface: to draw with, and as teachers of a small model.

`mlx_snapgen.public.first_use` and `convert.teacher` write their folders. Modules have their public
names, so that the keys of public LoRAs match.
"""
