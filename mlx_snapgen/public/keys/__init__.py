"""Names and sizes of public checkpoints, one file for each family."""
