"""Options of the training commands, and their values as settings."""
