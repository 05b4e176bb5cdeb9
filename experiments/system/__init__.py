"""What the operating system and the terminal need: files, signals, tables, progress."""
