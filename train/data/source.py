"""What a source of training data gives."""

import mlx.core as mx

Batch = dict[str, mx.array]
