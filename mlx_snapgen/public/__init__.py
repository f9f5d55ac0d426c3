"""Public checkpoints: find, read tensor by tensor, rename, and report every key."""
