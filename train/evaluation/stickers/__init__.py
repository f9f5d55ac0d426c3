"""GenEval-style scores of sticker models: a detector of glyphs, prompts, rules and tables."""
