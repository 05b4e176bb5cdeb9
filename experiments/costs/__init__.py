"""What a step costs, on the device at hand and on others."""
