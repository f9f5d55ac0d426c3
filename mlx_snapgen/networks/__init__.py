"""Networks of all parts: arrays in, arrays out. No files and no options."""
