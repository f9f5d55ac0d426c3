"""Large public flow models as teachers of a small one, behind one interface.

`python -m convert.teacher` writes a teacher's folder. Modules have their public names, so that the
keys of public LoRAs match.
"""
