"""The server: `python -m apps.server`, OpenAI's images API around one loaded model."""
