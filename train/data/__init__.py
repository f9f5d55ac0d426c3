"""What trainers learn from: batch k depends on k alone."""
