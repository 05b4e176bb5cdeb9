"""Where to look: rules from the gradient g at w to the direction v of the perturbation ρv."""
