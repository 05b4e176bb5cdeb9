"""What the operating system and the libraries around it need: files, signals, processes, terminals, devices."""
