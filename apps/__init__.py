"""Ways to draw with mlx_snapgen: a window and a server, both around one worker process."""
