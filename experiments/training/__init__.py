"""One run: its step, loop, checkpoints and logs, its devices and processes."""
