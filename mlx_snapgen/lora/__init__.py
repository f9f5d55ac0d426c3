"""LoRA adapters: attach, switch, fuse, and their files."""
