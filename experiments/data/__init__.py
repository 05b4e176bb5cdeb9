"""Image classification data: what a data set is here, and where each one comes from."""
