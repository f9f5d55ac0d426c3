"""What networks are trained to do: losses and their gradients."""
