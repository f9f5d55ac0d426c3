"""Training data. Batch k depends on k and the seed alone."""
