"""What all methods share: one step, from the gradient at w to the gradient for the next link of the chain."""
