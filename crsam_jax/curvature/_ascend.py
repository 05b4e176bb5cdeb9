"""Gradient ascent inside a ball, the inner problem of sharpness-aware minimization."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax import _trees as trees
from crsam_jax._checks import check_positive, whole_number
from crsam_jax.curvature import _vectors

AscentStep = Callable[[Any, Any, float, float], Any]


@jax.jit
def ascent_step(offset: Any, gradient: Any, step_size: float, rho: float) -> Any:
    """The offset moved by ``step_size`` along the unit gradient, then projected onto the ball of radius ρ."""
    moved = jax.tree.map(lambda u, v: u + step_size * v, offset, _vectors.unit(gradient))
    norm = trees.norm(moved)
    shrink = jnp.where(norm > rho, rho / norm, 1)
    return jax.tree.map(lambda u: shrink.astype(u.dtype) * u, moved)


def ascend(
    gradient_at: Callable[[Any], Any],
    start: Any,
    rho: float,
    num_steps: int,
    step_size: float | None,
    step: AscentStep = ascent_step,
) -> Any:
    """The offset after ``num_steps`` steps from ``start``. The default step size ρ/num_steps keeps it in the ball."""
    step_size = rho / num_steps if step_size is None else step_size
    offset = start
    for _ in range(num_steps):
        offset = step(offset, gradient_at(offset), step_size, rho)
    return offset


@jax.jit
def shifted(params: Any, offset: Any) -> Any:
    """The point w + δ."""
    return jax.tree.map(jnp.add, params, offset)


def check_ascent_arguments(rho: float, num_steps: int, step_size: float | None) -> int:
    """Checks radius, number of steps and step size; returns the number of steps as an int.

    Raises:
      TypeError: if one is not a number.
      ValueError: if one is not positive and finite.
    """
    check_positive("rho", rho)
    if step_size is not None:
        check_positive("step_size", step_size)
    return whole_number("num_steps", num_steps, at_least=1)
