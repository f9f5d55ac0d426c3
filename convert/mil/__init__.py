"""Programs of Core ML packages, read and run with numpy."""
