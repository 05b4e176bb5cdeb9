"""Training runs, comparisons, figures and benchmarks around ``crsam_jax``; not part of the package."""
