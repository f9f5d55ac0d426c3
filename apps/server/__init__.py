"""The server: `python -m apps.server`, OpenAI's images API for one loaded model.

HTTP, checks of requests, the queue and responses run in the server's process, without mlx (`app`,
`request`, `jobs`). The model runs in the worker process (`apps.worker.engine`).
"""
