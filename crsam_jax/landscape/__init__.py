"""Slices of the loss through parameter space: directions to look along, and the losses on a line or a plane.

A direction is a pytree like params: random ones from :func:`filter_normalized_directions`, the ascent direction from
:func:`gradient_direction`, eigenvectors from :func:`crsam_jax.curvature.top_eigenvalues`, those of the plane
through three checkpoints from :func:`plane_through`. :func:`orthonormalized` makes any of them orthonormal, and
:func:`output_axes` says what the filters are. :func:`line` and :func:`surface` evaluate the loss, on one batch or
over a whole data set.
"""

from crsam_jax.landscape.directions import (
    Plane,
    filter_normalized_directions,
    gradient_direction,
    orthonormalized,
    plane_through,
)
from crsam_jax.landscape.filters import output_axes
from crsam_jax.landscape.slices import line, surface

__all__ = [
    "Plane",
    "filter_normalized_directions",
    "gradient_direction",
    "line",
    "orthonormalized",
    "output_axes",
    "plane_through",
    "surface",
]
