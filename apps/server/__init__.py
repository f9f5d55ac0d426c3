"""The server: `python -m apps.server`, OpenAI's images API.

HTTP, checks of requests, forms with pictures, the queue and responses run in the server's process,
without mlx (`app`, `request`, `uploads`, `jobs`). The models run in the worker process
(`apps.worker.engine`).
"""
