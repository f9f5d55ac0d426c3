"""Public checkpoints: found, read tensor by tensor, renamed and accounted for."""
