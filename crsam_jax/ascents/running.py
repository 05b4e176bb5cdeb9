"""Ascents that remember gradients: the direction of Momentum-SAM, and Friendly SAM's."""

from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax.ascents.ascent import Ascent
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number
from crsam_jax.step.types import GradientFn


def momentum_ascent(decay: float = 0.9) -> Ascent:
    """Momentum-SAM's direction: v = −b/‖b‖ with b ← μ b + g, the momentum buffer before this step.

    The minus sign is the paper's: it perturbs along the step that momentum takes, as Nesterov's method does. The
    first step has no buffer and is not perturbed. Here b collects the gradients at w that the transformation is
    fed with, so that a step costs two evaluations. The paper collects the gradients at the perturbed point, which
    costs one: that is :func:`crsam_jax.msam`, the method to take for Momentum-SAM itself. This ascent is for
    combinations with other methods, ``crsam(loss_fn, ascent=momentum_ascent())`` for one.

    Args:
      decay: μ in [0, 1), that of the momentum.

    Raises:
      TypeError, ValueError: if decay is not a number in [0, 1).

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.momentum_ascent(decay=0.5)
      >>> g = jnp.array([3.0, 4.0])
      >>> direction, state = ascent.apply(g, ascent.init(g), g)
      >>> print(direction)
      [0. 0.]
      >>> direction, state = ascent.apply(g, state, g)
      >>> print(direction)
      [-0.6 -0.8]

    References:
      Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
      arXiv 2401.12033, algorithm 1.
    """
    check_number("decay", decay, below=1)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        direction = jax.tree.map(jnp.negative, trees.unit(state))
        return direction, _updated(state, lambda b, g: decay * b + g, grads)

    return Ascent(_zeros, apply)


def friendly_ascent(sigma: float = 1.0, decay: float = 0.9) -> Ascent:
    """Friendly SAM's direction: v = d/‖d‖ with d = g − σ m, m the running mean of the gradients before this one.

    m ← λ m + (1−λ) g, and m = g after the first gradient that is not zero. Taking out the running mean leaves the
    noise of the batch. In the first step d = g.

    Args:
      sigma: σ ≥ 0. σ = 0 is :func:`gradient_ascent`.
      decay: λ in [0, 1).

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.friendly_ascent(sigma=1.0, decay=0.5)
      >>> _, state = ascent.apply(jnp.array([2.0, 0.0]), ascent.init(jnp.zeros(2)), None)
      >>> direction, _ = ascent.apply(jnp.array([1.0, 3.0]), state, None)
      >>> print(direction * 10**0.5)  # [1, 3] − [2, 0]
      [-1.  3.]

    References:
      Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, arXiv 2403.12350, algorithm 1, with the start
      m = g of the authors' code.
    """
    check_number("sigma", sigma)
    check_number("decay", decay, below=1)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        difference = trees.wide_map(lambda g, m: g - sigma * m, grads, state)
        is_first = trees.norm(state) == 0

        def mean(m: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.where(is_first, g, decay * m + (1 - decay) * g)

        return trees.unit(difference), _updated(state, mean, grads)

    return Ascent(_zeros, apply)


def _updated(state: Any, rule: Any, grads: Any) -> Any:
    """The state after a step; a gradient that is not finite leaves it as it is."""
    new = trees.cast_like(trees.wide_map(rule, state, grads), state)
    return trees.select(trees.all_finite(grads), new, state)


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(p, trees.wide_dtype(p)), params)
