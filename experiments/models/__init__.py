"""Networks in Flax nnx."""
