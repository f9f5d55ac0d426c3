"""Shared by the commands: options, notices, prompt files and the prompt loop."""
