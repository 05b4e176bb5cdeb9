"""What is measured, and on how many examples."""

import dataclasses
from typing import Literal

What = Literal["all", "figure1", "figure2", "figure4", "figure5", "table3", "html"]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Settings of `python -m experiments figures`. They are saved beside the numbers, which belong to them."""

    epochs: tuple[int, ...] = ()
    """Epochs to measure, of those whose checkpoints were kept; all by default."""
    train_examples: int = 500
    """Training images on which curvature is measured, the same number of each class, without augmentation."""
    test_examples: int = 500
    """Test images on which it is measured."""
    num_probes: int = 16
    """Random probes of the Hessian's trace."""
    num_steps: int = 20
    """Lanczos steps for the largest eigenvalue."""
    ratio_examples: int = 320
    """Training images for the approximation ratio, in batches of the size trained with."""
    ratio_rho: float = 0.05
    """Radius of the approximation ratio, the same for all methods."""
    surface_points: int = 21
    """Points of the loss surface along each axis."""
    surface_extent: float = 1.0
    """The surface reaches from minus to plus this; 1 changes each filter by its own norm."""
    batch_size: int = 250
    """Images at once; changes nothing but memory and time."""
