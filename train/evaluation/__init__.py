"""Evaluation of models: validation losses, previews and scores."""
