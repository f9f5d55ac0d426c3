"""A model in a process of its own, and the messages to it and from it."""
