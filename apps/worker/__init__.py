"""A model in its own process.

`client` is the caller's side, without mlx; `engine` is the process that loads models and draws;
`messages` are sent between them.
"""
