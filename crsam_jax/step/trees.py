"""Arithmetic over pytrees: wide enough, and safe from overflow and underflow.

All leaves of a tree together are one vector here: norms, dot products and cosines run over the whole
tree. Half precision is widened to float32 first, inside the kernel that reads it; float64 stays float64.

A norm takes one pass and waits for no maximum. Each leaf gives three sums of squares at once, of its elements scaled
down, as they are, and scaled up by constant powers of two, and the one that neither overflowed nor lost its
digits is chosen at the end (Blue, "A Portable Fortran Program to Find the Euclidean Norm of a Vector", ACM TOMS
1978).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax.step.types import Params

# Leaves of at most this many elements share one reduction, instead of a kernel or two each.
_SMALL = 16_384


class ScaledNorm(NamedTuple):
    """A norm whose square is in range: ‖x‖ = ``length`` / 2^``exponent``."""

    length: jax.Array
    exponent: jax.Array

    @property
    def value(self) -> jax.Array:
        """‖x‖ itself, which may be out of range."""
        return jnp.ldexp(self.length, -self.exponent)

    @property
    def is_usable(self) -> jax.Array:
        """Whether x is finite and not zero (nor subnormal), so that it has a direction."""
        return jnp.isfinite(self.length) & (self.value >= jnp.finfo(self.length.dtype).tiny)


def wide_dtype(*trees: Any) -> np.dtype:
    """The widest dtype among all leaves, but at least float32."""
    return jnp.result_type(jnp.float32, *(jnp.result_type(leaf) for leaf in jax.tree.leaves(trees)))


def widen(tree: Params) -> Params:
    """Every leaf in float32, or in float64 where it already is."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, wide_dtype(leaf)), tree)


def cast_like(tree: Params, like: Params) -> Params:
    """The leaves of ``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda leaf, model: leaf.astype(jnp.result_type(model)), tree, like)


def wide_map(function: Callable[..., jax.Array], *trees: Params) -> Params:
    """``jax.tree.map`` over widened leaves."""
    return jax.tree.map(lambda *leaves: function(*(widen(leaf) for leaf in leaves)), *trees)


def select(condition: jax.Array, on_true: Params, on_false: Params) -> Params:
    """Leaf-wise ``where``: the branch not taken may hold NaN without harm."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def sums(terms: Callable[..., Sequence[jax.Array]], *trees: Params) -> list[jax.Array]:
    """Σ over all elements of each of ``terms(*elements)``, in one pass over the leaves.

    Args:
      terms: elementwise, from an array of each tree, widened, to the arrays to sum up.
      *trees: trees of one structure.

    Returns:
      One scalar a term, in the trees' wide dtype; zeros for trees without elements.
    """
    dtype = wide_dtype(*trees)
    rows = [[jnp.asarray(leaf, dtype) for leaf in row] for row in zip(*map(jax.tree.leaves, trees), strict=True)]
    # A leaf with a sharding of its own cannot be joined with others: it is summed up by itself, to a scalar.
    sharded = [row for row in rows if any(map(is_sharded, row))]
    whole = [row for row in rows if not any(map(is_sharded, row))]
    small = [row for row in whole if row[0].size <= _SMALL] or [[jnp.zeros(0, dtype)] * len(trees)]
    large = [row for row in whole if row[0].size > _SMALL]
    parts = [[jnp.sum(term) for term in terms(*row)] for row in sharded]
    parts += [[_folded(term) for term in terms(*row)] for row in large]
    parts.append(list(terms(*(_joined(column) for column in zip(*small, strict=True)))))
    # Without the barrier XLA splits the sum of the joined leaves up again, into one kernel for each leaf and term.
    joined = jax.lax.optimization_barrier([_joined(column) for column in zip(*parts, strict=True)])
    return [jnp.sum(column) for column in joined]


def is_sharded(leaf: jax.Array) -> bool:
    """Whether the type of a leaf says that explicit mesh axes divide it, so that it cannot be sliced or joined."""
    kind: Any = jax.typeof(leaf)
    return any(axis is not None for axis in kind.sharding.spec)


def norm(tree: Params) -> jax.Array:
    """‖x‖ over the whole tree, a scalar; NaN or Inf if an element is."""
    return scaled_norm(tree).value


def scaled_norm(tree: Params) -> ScaledNorm:
    """‖x‖ over the whole tree, apart from its size. The length is NaN or Inf if an element is, and else finite."""
    dtype = wide_dtype(tree)
    shift = jnp.finfo(dtype).maxexp * 5 // 8  # squares of elements shifted by it stay in range, whatever the element
    down, up = (math.ldexp(1.0, sign * shift) for sign in (-1, 1))
    large, plain, small = sums(lambda x: [(x * down) ** 2, x**2, (x * up) ** 2], tree)
    is_large = ~jnp.isfinite(plain)
    is_small = plain < math.ldexp(1.0, -jnp.finfo(dtype).maxexp // 2)  # squares may have lost digits to underflow
    square = jnp.where(is_large, large, jnp.where(is_small, small, plain))
    return ScaledNorm(safe_sqrt(square), jnp.where(is_large, -shift, jnp.where(is_small, shift, 0)))


def unit(tree: Params) -> Params:
    """x/‖x‖ in at least float32; zeros where x is zero (or subnormal) or not finite."""
    return scaled_by(tree, *unit_factors(scaled_norm(tree)))


def unit_factors(length: ScaledNorm) -> tuple[jax.Array, jax.Array]:
    """Two factors whose product is 1/‖x‖, to be applied one after the other; zeros where x has no direction."""
    one = jnp.ones((), length.length.dtype)
    factor = jnp.where(length.is_usable, 1 / jnp.where(length.is_usable, length.length, 1), 0)
    return jnp.ldexp(one, length.exponent), factor


def scaled_by(tree: Params, *factors: jax.Array) -> Params:
    """The tree, widened, times all of the factors, one after the other; zeros where the last is zero."""

    def scale(leaf: jax.Array) -> jax.Array:
        scaled = leaf
        for factor in factors:
            scaled = scaled * factor.astype(leaf.dtype)
        return jnp.where(factors[-1] == 0, 0, scaled)

    return wide_map(scale, tree)


def all_finite(tree: Params) -> jax.Array:
    """Whether every element is finite, as a boolean scalar."""
    return jnp.isfinite(scaled_norm(tree).length)


def dot(a: Params, b: Params) -> jax.Array:
    """⟨a, b⟩ over the whole tree, a scalar."""
    [product] = sums(lambda x, y: [x * y], a, b)
    return product


def cosine(a: Params, b: Params) -> jax.Array:
    """⟨a, b⟩/(‖a‖‖b‖), a scalar in [−1, 1] up to rounding; 0 where either is zero or not finite."""
    return dot(unit(a), unit(b))


def safe_sqrt(square: jax.Array) -> jax.Array:
    """√x; 0 with a derivative of 0 where x is not positive. NaN stays."""
    is_positive = ~(square <= 0)
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1)), 0)


def safe_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The ratio numerator/denominator; 0 where the denominator is not positive."""
    is_positive = denominator > 0
    return jnp.where(is_positive, numerator / jnp.where(is_positive, denominator, 1), 0)


def _folded(term: jax.Array) -> jax.Array:
    """The sum over all axes but a short last one, which is summed up later, together with those of other leaves."""
    axes = tuple(range(term.ndim - (term.shape[-1] <= _SMALL)))
    return jnp.sum(term, axis=axes)


def _joined(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.ravel(leaves[0]) if len(leaves) == 1 else jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
