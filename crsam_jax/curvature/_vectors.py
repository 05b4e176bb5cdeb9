"""Linear algebra on pytrees, leaf by leaf, so that leaves may be sharded over an explicit mesh.

Norms are safe in range. What is not finite gives NaN, never zero.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from crsam_jax import _trees as trees

Vector = tuple[jax.Array, ...]
"""An element of the vector space: the leaves of params that a measure runs over, in at least float32."""

Product = Callable[[Vector], Vector]
"""v -> Av for a symmetric matrix A."""


@jax.jit
def _scaled_norm(tree: Any) -> trees.ScaledNorm:
    return trees.scaled_norm(tree)


def norm(tree: Any) -> float:
    """‖x‖ over the whole tree, in the range of float64; NaN if an element is not finite."""
    length = _scaled_norm(tree)
    value = float(length.length) / float(length.scale)
    return value if math.isfinite(value) else math.nan


@jax.jit
def unit(tree: Any) -> Any:
    """x/‖x‖; zeros where x is zero, NaN if an element is not finite."""
    length = trees.scaled_norm(tree)
    divisor = jnp.where(jnp.isfinite(length.length), jnp.where(length.length == 0, 1, length.length), jnp.nan)
    return trees.wide_map(lambda leaf: leaf * length.scale.astype(leaf.dtype) / divisor.astype(leaf.dtype), tree)


@jax.jit
def shifted_by(tree: Any, exponent: Any) -> Any:
    """The tree times 2^exponent."""
    return jax.tree.map(lambda leaf: jnp.ldexp(leaf, exponent), tree)


@jax.jit
def dots_by_leaf(a: Vector, b: Vector) -> jax.Array:
    """⟨a, b⟩ for each leaf, [leaves]."""
    dtype = trees.wide_dtype(a, b)
    return jnp.stack([jnp.sum(x.astype(dtype) * y.astype(dtype)) for x, y in zip(a, b, strict=True)])


def placed_like(leaf: jax.Array, model: jax.Array) -> jax.Array:
    """``leaf`` with the sharding of ``model``."""
    return leaf if leaf.sharding == model.sharding else jax.device_put(leaf, model.sharding)


def replicated(leaf: Any) -> Any:
    """A leaf that is divided over a mesh as a whole on each of its devices."""
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and not leaf.is_fully_replicated:
        return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return leaf


def random_like(key: jax.Array, like: Vector, sampler: Callable[..., jax.Array] = jax.random.normal) -> Vector:
    """Random leaves of the shapes, dtypes and shardings of ``like``; the numbers do not depend on the shardings."""
    keys = jax.random.split(key, max(1, len(like)))
    return tuple(
        placed_like(sampler(leaf_key, leaf.shape, leaf.dtype), leaf) for leaf_key, leaf in zip(keys, like, strict=False)
    )


class Basis:
    """Up to ``capacity`` orthonormal vectors, to which further ones are added.

    Memory for ``capacity`` vectors is taken at once, so that one compiled program serves every step.
    """

    def __init__(self, like: Vector, capacity: int):
        self.rows = tuple(_zero_rows(leaf, capacity) for leaf in like)
        self.size = 0

    def append(self, vector: Vector) -> None:
        """Adds a unit vector that is orthogonal to the others."""
        self.rows = _with_row(self.rows, self.size, vector)
        self.size += 1

    def without_span(self, vector: Vector) -> tuple[Vector, np.ndarray[Any, Any]]:
        """``vector`` without its components in the basis, and these components, [capacity], float64."""
        rest, coefficients = _without_span(self.rows, vector)
        return rest, np.asarray(coefficients, np.float64)

    def coefficients(self, vector: Vector) -> np.ndarray[Any, Any]:
        """⟨qᵢ, vector⟩ for each vector qᵢ of the basis, [capacity], float64."""
        return np.asarray(_coefficients(self.rows, vector), np.float64)

    def combination(self, coordinates: Any) -> Vector:
        """Σ cᵢ qᵢ over the first ``len(coordinates)`` vectors."""
        capacity = self.rows[0].shape[0] if self.rows else 0
        return _combination(self.rows, jnp.asarray(np.pad(coordinates, (0, capacity - len(coordinates)))))

    def __getitem__(self, index: int) -> Vector:
        return self.combination(np.eye(self.size)[index])


def _zero_rows(leaf: jax.Array, capacity: int) -> jax.Array:
    return jnp.zeros_like(leaf, shape=leaf.shape)[None] * jnp.zeros((capacity, *[1] * leaf.ndim), leaf.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _with_row(rows: Vector, index: Any, vector: Vector) -> Vector:
    return tuple(
        jnp.where((jnp.arange(len(row)) == index).reshape(-1, *[1] * leaf.ndim), leaf[None], row)
        for row, leaf in zip(rows, vector, strict=True)
    )


@jax.jit
def _coefficients(rows: Vector, vector: Vector) -> jax.Array:
    dtype = trees.wide_dtype(vector)
    return sum((_inner(row, leaf).astype(dtype) for row, leaf in zip(rows, vector, strict=True)), jnp.zeros((), dtype))


@jax.jit
def _without_span(rows: Vector, vector: Vector) -> tuple[Vector, jax.Array]:
    total: Any = 0
    for _ in range(2):  # the second time removes what rounding left
        coefficients = _coefficients(rows, vector)
        inside = _combination(rows, coefficients)
        vector = jax.tree.map(jnp.subtract, vector, inside)
        total = total + coefficients
    return vector, total


@jax.jit
def _combination(rows: Vector, coordinates: jax.Array) -> Vector:
    return tuple(jnp.tensordot(coordinates.astype(row.dtype), row, 1, precision="highest") for row in rows)


def _inner(row: jax.Array, leaf: jax.Array) -> jax.Array:
    """⟨row[i], leaf⟩ for each i. A contraction over sharded axes does not trace on an explicit mesh, a sum does."""
    if trees.is_sharded(leaf):
        return jnp.sum(row * leaf[None], axis=tuple(range(1, row.ndim)))
    return jnp.tensordot(row, leaf, leaf.ndim, precision="highest")


def size(vectors: Sequence[jax.Array]) -> int:
    """The number of elements of all leaves together."""
    return sum(leaf.size for leaf in vectors)


@jax.jit
def residual(image: Vector, exponent: Any, value: Any, vector: Vector) -> Vector:
    """2^−exponent · image − value · vector."""
    return tuple(jnp.ldexp(y, -exponent) - jnp.asarray(value, y.dtype) * x for y, x in zip(image, vector, strict=True))
