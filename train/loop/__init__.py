"""The training loop: a run's folder, its steps, and several processes."""
