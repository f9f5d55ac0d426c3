"""What the commands share: options and the prompt loop."""
