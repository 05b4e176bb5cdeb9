"""The methods, a file for each or for close relatives: the rule, beside its paper's formula, and the constructor."""
