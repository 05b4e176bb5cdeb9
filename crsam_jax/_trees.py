"""Trees of parameters: arithmetic that is wide enough and safe in range, and checks of what a tree holds.

A tree is one vector: norms and inner products run over all leaves. Half precision is widened to float32 inside the
kernel that reads it; float64 stays float64.

A norm takes one pass. Each leaf gives three sums of squares: of its elements scaled down, unscaled, and scaled up by a
constant power of two. The sum that neither overflowed nor lost digits is chosen at the end (Blue, "A Portable Fortran
Program to Find the Euclidean Norm of a Vector", ACM TOMS 1978).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params: TypeAlias = Any
"""A pytree of real floating arrays: parameters, or a gradient, direction or point of the same structure."""

# Leaves of at most this many elements share one reduction, instead of a kernel or two each.
_SMALL = 16_384


class ScaledNorm(NamedTuple):
    """A norm whose square is in range: ‖x‖ = ``length``/``scale``, where ``scale`` is a power of two."""

    length: jax.Array
    scale: jax.Array

    @property
    def value(self) -> jax.Array:
        """‖x‖ itself, which may be out of range."""
        return self.length / self.scale

    @property
    def is_usable(self) -> jax.Array:
        """Whether x is finite and not zero (nor subnormal), so that it has a direction."""
        return jnp.isfinite(self.length) & (self.value >= jnp.finfo(self.length.dtype).tiny)


def wide_dtype(*trees: Any) -> np.dtype:
    """float64 if any leaf is float64, else float32."""
    is_double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(trees))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


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
    """One tree or the other; the one not chosen may hold NaN without harm."""
    return jax.tree.map(lambda a, b: jax.lax.select_n(condition, b, a), on_true, on_false)


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
    # Hidden from the compiler, which would turn (x · c)² of a single element into x² · c², and c² leaves the range.
    down, up = jax.lax.optimization_barrier([jnp.asarray(math.ldexp(1.0, sign * shift), dtype) for sign in (-1, 1)])
    large, plain, small = sums(lambda x: [(x * down) ** 2, x**2, (x * up) ** 2], tree)
    is_large = ~jnp.isfinite(plain)
    is_small = plain < math.ldexp(1.0, -jnp.finfo(dtype).maxexp // 2)  # squares may have lost digits to underflow
    square = jnp.where(is_large, large, jnp.where(is_small, small, plain))
    return ScaledNorm(safe_sqrt(square), jnp.where(is_large, down, jnp.where(is_small, up, 1)).astype(dtype))


def unit(tree: Params) -> Params:
    """x/‖x‖ in at least float32; zeros where x is zero (or subnormal) or not finite."""
    return scaled_by(tree, *unit_factors(scaled_norm(tree)))


def unit_factors(length: ScaledNorm) -> tuple[jax.Array, jax.Array]:
    """Two factors whose product is 1/‖x‖, to be applied one after the other; zeros where x has no direction."""
    is_usable = length.is_usable
    return length.scale, jnp.where(is_usable, 1 / jnp.where(is_usable, length.length, 1), 0)


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
    """The sum over all axes but a short last one, which is summed later together with other leaves."""
    axes = tuple(range(term.ndim - (term.shape[-1] <= _SMALL)))
    return jnp.sum(term, axis=axes)


def _joined(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.ravel(leaves[0]) if len(leaves) == 1 else jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def check_params(params: Any) -> None:
    """Checks that params are there, whole, and made of real floating arrays.

    Raises:
      ValueError: if params is None, or a mask hides part of it.
      TypeError: if a leaf is no array, or complex or integer.
    """
    if params is None:
        raise ValueError("params is None, but the loss is evaluated at params: call update(grads, state, params, ...).")
    check_leaves(params)


def check_leaves(params: Any) -> None:
    """The check of :func:`check_params`, but None passes: an optimizer's ``init`` leaves that to ``update``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hidden):
        where = jax.tree_util.keystr(path) or "the root"
        if is_hidden(leaf):
            raise ValueError(
                f"params is hidden at {where}: an optax.masked or optax.partition stands around this "
                "transformation, which cannot evaluate the loss on part of the parameters. Put it first in the "
                "chain, outside of them; to perturb only part of the parameters, use its argument mask=."
            )
        if not _is_array(leaf):
            raise TypeError(
                f"params has a leaf of type {kind_of(leaf)} at {where}, which is no array. Keep what is no array out "
                "of params and let loss_fn put it in again; partition an Equinox model first: params, static = "
                f"eqx.partition(model, eqx.is_inexact_array).{_advice(params)}"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params has dtype {dtype} at {where}; only real floating leaves can be perturbed. Keep other "
                f"leaves out of params and pass them to loss_fn as an argument of its own.{_advice(params)}"
            )


def check_gradient(grads: Any, params: Any) -> None:
    """Checks that the gradient has the structure and the shapes of params.

    Raises:
      ValueError: naming the place, if it does not.
      TypeError: if a leaf is not real and floating.
    """
    found: Any = jax.tree.structure(grads)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(
            f"The gradient does not have the tree structure of params{_missing_leaf(grads, params)}: pass the gradient "
            f"of loss_fn with respect to the same params. Gradient: {found}; params: {expected}."
        )
    for (path, grad), param in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        where = jax.tree_util.keystr(path) or "the root"
        if jnp.shape(grad) != jnp.shape(param):
            raise ValueError(
                f"The gradient has shape {jnp.shape(grad)} at {where} where params has {jnp.shape(param)}; "
                "it must be the gradient of loss_fn with respect to the same params."
            )
        if not jnp.issubdtype(jnp.result_type(grad), jnp.floating):
            raise TypeError(f"The gradient has dtype {jnp.result_type(grad)} at {where}; it must be real and floating.")


def is_hidden(node: Any) -> bool:
    """Whether an optax.masked or optax.partition has put this in the place of a part of the params."""
    return isinstance(node, optax.MaskedNode)


def _advice(params: Any) -> str:
    """The advice to add to a message about an object that may be a model."""
    if _is_array(params) or isinstance(params, (Mapping, list, tuple)):
        return ""
    name = f"{type(params).__module__}.{type(params).__qualname__}"
    return (
        f" params is an object of type {name}: if it is a model, pass its parameters alone, from "
        "nnx.split(model, nnx.Param, ...), variables['params'] of Linen, eqx.partition, or the trainable "
        "variables of Keras, and let loss_fn apply the model to them."
    )


def _missing_leaf(grads: Any, params: Any) -> str:
    """What a message says of the first place where the gradient is None and params has an array; else nothing."""
    arrays = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda node: node is None):
        if grad is None and path in arrays:
            return (
                f" (it is None at {jax.tree_util.keystr(path) or 'the root'}, where params has an array: for a leaf "
                "that is not trained pass zeros, or give params without it; mask= says what is not perturbed)"
            )
    return ""


def kind_of(leaf: Any) -> str:
    """What a leaf is, in a few words: a number by its value, an array by dtype and shape, anything else by its type."""
    if isinstance(leaf, (bool, int, float, complex)):
        return repr(leaf)
    if _is_array(leaf):
        return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
    return type(leaf).__name__


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, traced or not, or a number."""
    if isinstance(leaf, type):
        return False
    return isinstance(leaf, (bool, int, float, complex)) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))
