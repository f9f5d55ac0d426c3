"""Models on disk: folders to objects and back."""
