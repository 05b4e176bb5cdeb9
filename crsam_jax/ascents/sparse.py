"""Sparse ascents (SSAM): the perturbation of SAM with most of its elements set to zero.

v = (g/‖g‖) ⊙ m with a binary mask m over all elements, not renormalized, so that ‖v‖ ≤ 1. The mask says which
elements are worth perturbing; it saves no work here: an evaluation covers all params.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from crsam_jax.ascents.ascent import Ascent
from crsam_jax.ascents.noisy import step_key, uniform_like
from crsam_jax.step import trees
from crsam_jax.step.checks import check_number, check_seed, kind_of
from crsam_jax.step.types import GradientFn


class SparseState(NamedTuple):
    """State of :func:`dynamic_sparse_ascent`: steps so far, and the mask, a tree of bool arrays like params."""

    steps: jax.Array
    mask: Any


def largest_fraction(scores: Any, fraction: float) -> Any:
    """The mask of the elements with the largest scores, over the whole tree.

    With the mean of squared gradients of single examples as scores this is the mask of SSAM-F (Fisher information).

    Args:
      scores: a tree of real arrays.
      fraction: share of the elements to keep, in [0, 1]; round(fraction · n) elements are kept, ties by position.

    Returns:
      A tree of bool arrays like ``scores``.

    Raises:
      TypeError, ValueError: if fraction is not a number in [0, 1].

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> print(crsam_jax.largest_fraction({"a": jnp.array([1.0, 5.0]), "b": jnp.array([3.0, 2.0])}, 0.5)["b"])
      [ True False]
    """
    check_number("1 - fraction", 1 - fraction)
    check_number("fraction", fraction)
    leaves, structure = jax.tree.flatten(scores)
    sizes = [leaf.size for leaf in leaves]
    return _unflatten(_top(_flatten(leaves), round(fraction * sum(sizes))), leaves, structure)


def sparse_ascent(mask: Any) -> Ascent:
    """SSAM with a fixed mask: v = (g/‖g‖) ⊙ m.

    Args:
      mask: a tree of bool arrays like params; see :func:`largest_fraction`.

    Raises:
      TypeError: if a leaf of the mask is not a bool array.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> g = jnp.array([3.0, 4.0])
      >>> direction, _ = crsam_jax.sparse_ascent(jnp.array([True, False])).apply(g, (), g)
      >>> print(direction)
      [0.6 0. ]

    References:
      Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach", NeurIPS 2022,
      arXiv 2210.05177, algorithm 1. The paper refreshes the mask of SSAM-F every few epochs: build the ascent anew.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not hasattr(leaf, "dtype") or leaf.dtype != jnp.bool_:
            where = jax.tree_util.keystr(path) or "the root"
            raise TypeError(f"mask must have bool arrays at its leaves, found {kind_of(leaf)} at {where}.")

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        return _masked(trees.unit(grads), mask), state

    return Ascent(lambda params: (), apply)


def dynamic_sparse_ascent(
    sparsity: float = 0.5, drop: float = 0.5, update_every: int = 100, total_steps: int = 10_000, seed: int = 0
) -> Ascent:
    """SSAM-D: a random mask that, every so often, drops the elements with the smallest abs(g) and regrows others.

    At update step t the share drop · (1 + cos(πt/T))/2 of the kept elements is dropped, and as many of the others are
    taken in at random. One sort over all elements per update step.

    Args:
      sparsity: share of the elements that are not perturbed, in [0, 1).
      drop: share that is exchanged at the first update, in [0, 1].
      update_every: steps between updates of the mask, ≥ 1.
      total_steps: T, when the exchange has faded out.
      seed: an integer.

    Raises:
      TypeError, ValueError: for bad numbers.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> ascent = crsam_jax.dynamic_sparse_ascent(sparsity=0.75, update_every=1)
      >>> g = jnp.arange(1.0, 9.0)
      >>> state = ascent.init(g)
      >>> for _ in range(3):
      ...   direction, state = ascent.apply(g, state, g)
      ...   print(jnp.sum(direction != 0))
      2
      2
      2

    References:
      Mi et al., NeurIPS 2022, arXiv 2210.05177, algorithm 3, with drop by gradient and growth at random, the
      authors' default.
    """
    check_number("sparsity", sparsity, below=1)
    check_number("drop", drop)
    check_number("1 - drop", 1 - drop)
    for name, value in {"update_every": update_every, "total_steps": total_steps}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    check_seed(seed)

    def init(params: Any) -> SparseState:
        steps = jnp.zeros((), jnp.int32)
        return SparseState(steps, largest_fraction(uniform_like(step_key(seed, steps), params), 1 - sparsity))

    def apply(grads: Any, state: Any, params: Any, gradient_fn: GradientFn | None = None) -> tuple[Any, Any]:
        del params, gradient_fn
        direction = _masked(trees.unit(grads), state.mask)
        steps = state.steps + 1
        share = drop * (1 + jnp.cos(jnp.pi * jnp.minimum(steps / total_steps, 1))) / 2
        mask = jax.lax.cond(
            (steps % update_every == 0) & trees.all_finite(grads),
            lambda: _exchanged(state.mask, grads, uniform_like(step_key(seed, steps), grads), share),
            lambda: state.mask,
        )
        return direction, SparseState(steps, mask)

    return Ascent(init, apply)


def _exchanged(mask: Any, grads: Any, growth: Any, share: jax.Array) -> Any:
    """The mask with ``share`` of its elements, those of smallest |g|, replaced by as many of the largest ``growth``."""
    leaves, structure = jax.tree.flatten(mask)
    kept = _flatten(leaves, bool)
    number = jnp.floor(share * jnp.sum(kept)).astype(jnp.int32)
    size = jnp.abs(_flatten(jax.tree.leaves(grads)))
    dropped = _rank(jnp.where(kept, size, jnp.inf)) < jnp.minimum(number, jnp.sum(~kept))
    grown = _rank(jnp.where(kept, jnp.inf, -_flatten(jax.tree.leaves(growth)))) < jnp.sum(dropped)
    return _unflatten((kept & ~dropped) | grown, leaves, structure)


def _rank(values: jax.Array) -> jax.Array:
    """The place of each element in ascending order."""
    return jnp.argsort(jnp.argsort(values, stable=True))


def _top(values: jax.Array, number: int) -> jax.Array:
    return _rank(-values) < number


def _masked(direction: Any, mask: Any) -> Any:
    return jax.tree.map(lambda v, kept: jnp.where(kept, v, 0), direction, mask)


def _flatten(leaves: list[jax.Array], dtype: DTypeLike = jnp.float32) -> jax.Array:
    if not leaves:
        return jnp.zeros(0, dtype)
    return jnp.concatenate([jnp.ravel(_gathered(leaf)) for leaf in leaves])


def _gathered(leaf: jax.Array) -> jax.Array:
    """The leaf on every device if explicit mesh axes divide it: the order of all elements needs all of them."""
    return jax.sharding.reshard(leaf, jax.sharding.PartitionSpec()) if trees.is_sharded(leaf) else leaf


def _unflatten(flat: jax.Array, like: list[jax.Array], structure: Any) -> Any:
    parts, start = [], 0
    for leaf in like:
        part = flat[start : start + leaf.size].reshape(leaf.shape)
        if trees.is_sharded(leaf):
            kind: Any = jax.typeof(leaf)
            part = jax.sharding.reshard(part, kind.sharding)
        parts.append(part)
        start += leaf.size
    return jax.tree.unflatten(structure, parts)
