"""The paper's figures 1, 2, 4, 5 and table 3 from training runs: measured once, saved as CSV, drawn from there."""
