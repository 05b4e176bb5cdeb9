"""Gauss quadrature from Lanczos, and its smoothed density."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from crsam_jax._checks import check_positive, whole_number
from crsam_jax.curvature._lanczos import Krylov
from crsam_jax.curvature.results import Spectrum

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


def quadrature(krylovs: Iterable[Krylov], num_steps: int) -> tuple[Array, Array]:
    """Nodes and weights of each probe; what an exhausted Krylov space lacks is filled with weight 0."""
    nodes, weights = [], []
    for krylov in krylovs:  # one after the other: each holds a basis
        missing = (0, num_steps - len(krylov.values))
        nodes.append(np.pad(np.ldexp(krylov.values, krylov.exponent), missing, mode="edge"))
        weights.append(np.pad(krylov.coordinates[0] ** 2, missing))
    return np.stack(nodes), np.stack(weights)


def smoothed(nodes: Array, weights: Array, grid: int | Array, width: float | None, size: int) -> Spectrum:
    """The density of the nodes of all probes, smoothed, with its standard error."""
    low, high = nodes.min(), nodes.max()
    if width is None:
        width = float(np.maximum(0.01 * (high - low), 1e-4 * np.max(np.abs(nodes)))) or 1.0
    points = np.linspace(low - 4 * width, high + 4 * width, grid) if isinstance(grid, int) else grid
    densities, squares = [], []
    for node, weight in zip(nodes, weights, strict=True):
        bumps = np.exp(-0.5 * ((points[:, None] - node) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        densities.append(bumps @ weight)
        squares.append(bumps**2 @ weight)
    density = np.mean(densities, axis=0)
    of_measures = 2 / (size + 2) * np.maximum(np.mean(squares, axis=0) - density**2, 0.0)
    variance = np.maximum(np.var(densities, axis=0, ddof=1), of_measures) / len(densities)
    return Spectrum(points, density, np.sqrt(variance), nodes, weights)


def check_width(width: float | None) -> None:
    """Checks that a width is positive; the unsmoothed density is a sum of spikes.

    Raises:
      TypeError, ValueError: if it is not.
    """
    if width is not None:
        check_positive("width", width)


def checked_grid(grid: Any) -> int | Array:
    """A number of points as an int, or the points as a vector.

    Raises:
      TypeError, ValueError: if it is neither.
    """
    if isinstance(grid, (int, np.integer)) and not isinstance(grid, bool):
        return whole_number("grid", grid, at_least=2)
    points = np.asarray(grid, np.float64)
    if points.ndim != 1 or not points.size or not np.all(np.isfinite(points)):
        raise ValueError(f"grid must be a number of points or a vector of finite numbers, got shape {points.shape}.")
    return points
