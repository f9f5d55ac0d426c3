"""The networks in PyTorch, and conversion of weights in both directions."""
