"""Applications: a window and a server. In both, a worker process runs the model."""
