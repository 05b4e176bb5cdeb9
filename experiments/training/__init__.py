"""One run: its step, loop, checkpoints and logs."""
