"""Ascents that draw random numbers: random smoothing (R-SAM) and stochastic weight perturbation (ESAM).

The noise of step t depends on the seed and on t alone, so that a run can be repeated and resumed, and all
devices of a mesh draw the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from crsam_jax.ascents.ascent import Ascent
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number, check_seed
from crsam_jax.step.types import GradientFn


def smoothed_ascent(sigma: float = 0.05, weight: float = 1.0, seed: int = 0) -> Ascent:
    """R-SAM's direction: v = (Δ + λ ∇L(w+Δ))/‖Δ + λ ∇L(w+Δ)‖ with Gaussian noise Δ, for one more evaluation.

    Δ is drawn filter by filter: within a filter (a slice along the last axis; a leaf of one axis or none is one
    filter) the elements are independent with variance σ²‖filter‖²/n, n their number, so that E‖Δ‖² = σ²‖w‖².

    Args:
      sigma: σ ≥ 0, size of the noise relative to the weights. σ = 0 is :func:`gradient_ascent`.
      weight: λ > 0, weight of the gradient against the noise.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.smoothed_ascent(sigma=0.1)
      >>> w = jnp.array([3.0, 4.0])
      >>> direction, state = ascent.apply(w, ascent.init(w), w, lambda point: point)
      >>> print(jnp.linalg.norm(direction))
      1.0

    References:
      Liu et al., "Random Sharpness-Aware Minimization", NeurIPS 2022. Verified from its abstract: the loss is
      smoothed by a random perturbation and the ascent step is taken from there. Not verified, for want of the
      paper's body: that the noise stays in the perturbation, the role of λ, and the noise's scale, which is a
      convention of this library.
    """
    check_number("sigma", sigma)
    check_number("weight", weight)
    check_seed(seed)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn) -> tuple[Any, Any]:
        del grads
        noise = jax.tree.map(_relative_to_filters, normal_like(step_key(seed, state), params), params)
        noise = jax.tree.map(lambda leaf: sigma * leaf, noise)
        smoothed = jax.tree.map(lambda w, delta: (w + delta).astype(jnp.result_type(w)), params, noise)
        combined = trees.wide_map(lambda delta, g: delta + weight * g, noise, gradient_fn(smoothed))
        return trees.unit(combined), optax.safe_increment(state)

    return Ascent(_count, apply)


def dropped_ascent(keep: float = 0.5, seed: int = 0) -> Ascent:
    """ESAM's stochastic weight perturbation: v = (g ⊙ m)/(β‖g ⊙ m‖), each element kept with probability β.

    ‖v‖ is 1/β. Which elements are kept is drawn anew in every step. That saves no work here: an
    evaluation covers all params.

    Args:
      keep: β in (0, 1]. β = 1 is :func:`gradient_ascent`.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.dropped_ascent(keep=0.5)
      >>> g = jnp.ones(1000)
      >>> direction, _ = ascent.apply(g, ascent.init(g), g)
      >>> print(jnp.linalg.norm(direction), bool(abs(jnp.mean(direction == 0) - 0.5) < 0.1))
      2.0 True

    References:
      Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
      arXiv 2110.03141. The authors' code drops whole tensors instead of elements.
    """
    check_number("1 - keep", 1 - keep, below=1)
    check_seed(seed)

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        uniform = uniform_like(step_key(seed, state), grads)
        kept = jax.tree.map(lambda g, u: jnp.where(u < keep, g, 0), grads, uniform)
        return jax.tree.map(lambda leaf: leaf / keep, trees.unit(kept)), optax.safe_increment(state)

    return Ascent(_count, apply)


def step_key(seed: int, count: jax.Array) -> jax.Array:
    """The key of a step, a function of the seed and of the number of steps before it."""
    return jax.random.fold_in(jax.random.key(seed), count)


def normal_like(key: jax.Array, params: Any) -> Any:
    """Independent standard normal numbers in the shapes of params, in at least float32."""
    return optax.tree.random_like(key, trees.widen(params), jax.random.normal)


def uniform_like(key: jax.Array, params: Any) -> Any:
    """Independent uniform numbers in [0, 1) in the shapes of params, in float32."""
    return optax.tree.random_like(key, params, jax.random.uniform, dtype=jnp.float32)


def _relative_to_filters(noise: jax.Array, param: jax.Array) -> jax.Array:
    axes = tuple(range(param.ndim - 1)) if param.ndim > 1 else None
    wide = param.astype(noise.dtype)
    return noise * jnp.sqrt(jnp.mean(wide**2, axis=axes, keepdims=True))


def _count(params: Any) -> jax.Array:
    del params
    return jnp.zeros((), jnp.int32)
