"""Sets of captioned pictures, read record by record: a module for each format."""
