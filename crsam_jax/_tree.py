"""Arithmetic over pytrees: wide enough, and safe from overflow and underflow.

All leaves of a tree together are one vector here: norms, dot products and cosines run over the whole
tree. Half precision is widened to float32 first; float64 stays float64.

The maximum over all leaves is taken by a sort, because XLA never fuses one with what follows. A maximum that it can
fuse it computes again in the loop of every leaf that is scaled by it: compile time then grows with the square of
the number of leaves, to minutes for a network of 120 on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Powers of two up to this much below the largest exponent, and their inverses, are normal numbers.
_EXPONENT_MARGIN = 3


def wide_dtype(*trees: Any) -> np.dtype:
    """The widest dtype among all leaves, but at least float32."""
    return jnp.result_type(jnp.float32, *(jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)))


def widen(tree: Any) -> Any:
    """Every leaf in float32, or in float64 where it already is."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide_dtype(leaf)), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """The leaves of ``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda leaf, model: leaf.astype(jnp.result_type(model)), tree, like)


def wide_map(function: Callable[..., jax.Array], *trees: Any) -> Any:
    """``jax.tree.map`` over widened leaves."""
    return jax.tree.map(lambda *leaves: function(*(widen(leaf) for leaf in leaves)), *trees)


def select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Leaf-wise ``where``: the branch not taken may hold NaN without harm."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def max_abs(tree: Any) -> jax.Array:
    """The largest |xᵢ|, a scalar; 0 for a tree without elements. NaN and Inf show through it."""
    dtype = wide_dtype(tree)
    maxima = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jax.lax.sort(jnp.stack([jnp.zeros((), dtype), *maxima]))[-1]  # NaN is last


def all_finite(tree: Any) -> jax.Array:
    """Whether every element is finite, as a boolean scalar."""
    return jnp.isfinite(max_abs(tree))


def dot(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ over the whole tree, a scalar."""
    dtype = wide_dtype(a, b)
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return jnp.sum(jnp.stack([jnp.zeros((), dtype), *jax.tree.leaves(products)]))


def _rescaled(tree: Any) -> tuple[Any, jax.Array]:
    """The tree times a power of two that brings its largest element near 1, and that power.

    A power of two changes no digit, so norms in the ordinary range equal the naive ones exactly,
    while squares can neither overflow nor underflow.
    """
    dtype = wide_dtype(tree)
    largest = jnp.finfo(dtype).maxexp - _EXPONENT_MARGIN
    _, exponent = jnp.frexp(max_abs(tree))
    scale = jnp.ldexp(jnp.ones((), dtype), -jnp.clip(exponent, -largest, largest))
    return wide_map(lambda x: x * scale, tree), scale


def norm(tree: Any) -> jax.Array:
    """‖x‖ over the whole tree, a scalar; NaN or Inf if an element is."""
    rescaled, scale = _rescaled(tree)
    return jnp.sqrt(dot(rescaled, rescaled)) / scale


def unit(tree: Any) -> Any:
    """x/‖x‖ in at least float32; zeros where x is zero (or subnormal) or not finite."""
    rescaled, _ = _rescaled(tree)
    length = jnp.sqrt(dot(rescaled, rescaled))
    usable = jnp.isfinite(length) & (max_abs(tree) >= jnp.finfo(length.dtype).tiny)
    divisor = jnp.where(usable, length, 1)
    return jax.tree.map(lambda x: jnp.where(usable, x / divisor, 0), rescaled)


def safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Numerator/denominator; 0 where the denominator is not positive."""
    is_positive = denominator > 0
    return jnp.where(is_positive, numerator / jnp.where(is_positive, denominator, 1), 0)


def cosine(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩/(‖a‖‖b‖), a scalar in [−1, 1] up to rounding; 0 where either is zero or not finite."""
    (a, _), (b, _) = _rescaled(a), _rescaled(b)
    lengths = jnp.sqrt(dot(a, a)) * jnp.sqrt(dot(b, b))
    return safe_ratio(dot(a, b), jnp.where(jnp.isfinite(lengths), lengths, 0))
