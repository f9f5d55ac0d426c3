"""The networks: arrays in, arrays out; no files, no options."""
