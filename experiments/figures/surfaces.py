"""The numbers behind figure 4: the training loss on a plane around each method's last network."""

from typing import NamedTuple

import jax
import numpy as np

from crsam_jax import curvature, landscape
from experiments.figures.network import Losses
from experiments.figures.settings import Figures
from experiments.figures.trained import Snapshot
from experiments.inputs import Batch


class SurfacePoint(NamedTuple):
    """A row of surface.csv: the loss at w + x d₁ + y d₂."""

    method: str
    seed: int
    epoch: int
    x: float
    y: float
    loss: float


def measure_surface(
    losses: Losses, snapshot: Snapshot, batch: Batch, settings: Figures, run: tuple[str, int]
) -> list[SurfacePoint]:
    """The loss along two orthogonal filter-normalized random directions, drawn from the same key for all networks.

    Args:
      losses: of the network.
      snapshot: the network.
      batch: normalized images and labels.
      settings: the grid.
      run: method and seed, for the rows.

    Returns:
      A row a point, x running fastest.

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    axes = landscape.filter_normalized_directions(snapshot.params, jax.random.key(0))
    grid = np.linspace(-settings.surface_extent, settings.surface_extent, settings.surface_points)
    data = curvature.Batches({"batch": batch}, settings.batch_size, fixed={"model_state": snapshot.model_state})
    # One point at a time: convolutions batched over params are slow on CPU.
    values = landscape.surface(losses.mean, snapshot.params, (axes[0], axes[1]), grid, grid, data, chunk_size=1)
    return [
        SurfacePoint(*run, snapshot.epoch, float(x), float(y), float(loss))
        for y, row in zip(grid, values, strict=True)
        for x, loss in zip(grid, row, strict=True)
    ]
