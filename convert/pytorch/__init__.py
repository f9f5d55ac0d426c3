"""The networks in PyTorch, and weights there and back."""
