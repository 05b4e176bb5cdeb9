"""Gradients as symbols: what a method returns is a linear combination of them, and so only weights are computed with.

A :class:`Vector` holds weights on the trees that a step has at hand, its basis: g, the change g⁺ − g, and one more tree
for each further point. ``plus.grad - minus.grad`` costs nothing; the trees are read when all weights are known.
The basis is one of differences, so that nothing cancels where weights add up to zero.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.types import Params, Scalar


@dataclasses.dataclass(frozen=True)
class Vector:
    """A linear combination of the gradients of a step.

    Vectors of one step are added, subtracted, and multiplied or divided by scalars, known or traced.

    Attributes:
      weights: the weights of the trees of the basis, g first.

    Example:
      >>> from crsam_jax import Vector
      >>> here, plus = Vector((1.0, 0.0)), Vector((1.0, 1.0))  # g, and g⁺ = g + (g⁺ − g)
      >>> 0.5 * here + 0.5 * plus
      Vector(weights=(1.0, 0.5))
    """

    weights: tuple[Scalar, ...]

    def __add__(self, other: "Vector") -> "Vector":
        return Vector(tuple(a + b for a, b in zip(self.weights, other.weights, strict=True)))

    def __sub__(self, other: "Vector") -> "Vector":
        return Vector(tuple(a - b for a, b in zip(self.weights, other.weights, strict=True)))

    def __mul__(self, scalar: Scalar) -> "Vector":
        return Vector(tuple(weight if _is_zero(weight) else scalar * weight for weight in self.weights))

    def __rmul__(self, scalar: Scalar) -> "Vector":
        return self * scalar

    def __truediv__(self, scalar: Scalar) -> "Vector":
        return Vector(tuple(weight if _is_zero(weight) else weight / scalar for weight in self.weights))

    def __neg__(self) -> "Vector":
        return self * -1.0


def where(condition: jax.Array, on_true: Vector, on_false: Vector) -> Vector:
    """One of two vectors; a weight that both share stays as it is."""

    def choose(a: Scalar, b: Scalar) -> Scalar:
        is_shared = not isinstance(a, jax.Array) and not isinstance(b, jax.Array) and a == b
        return a if is_shared else jnp.where(condition, a, b)

    return Vector(tuple(choose(a, b) for a, b in zip(on_true.weights, on_false.weights, strict=True)))


Elements: TypeAlias = Callable[..., Sequence[jax.Array]]
"""Elementwise, from arrays of g, g⁺ and further gradients to the elements of a basis after g and g⁺ − g."""


def combined(vector: Vector, elements: Elements, grads: Params, plus: Params, *further: Params) -> Params:
    """The tree that a vector stands for, in the dtypes of g: one pass over the leaves.

    What has weight zero is not touched, so that a NaN in it does no harm: g alone is g and g⁺ alone is g⁺, to the bit.

    Args:
      vector: weights of g, of g⁺ − g, and of ``elements``.
      elements: the elements of the basis, computed from the gradients.
      grads: g.
      plus: g⁺.
      *further: the gradients at further points.
    """
    on_grads, on_change, *on_elements = vector.weights
    # The sum starts from g or from g⁺, whichever is nearer; then only a part of the change is added.
    is_near_plus = jnp.abs(jnp.asarray(on_change - on_grads)) < jnp.abs(jnp.asarray(on_change))
    on_change = jnp.where(is_near_plus, on_change - on_grads, on_change)

    def leaf(g: jax.Array, plus: jax.Array, *others: jax.Array) -> jax.Array:
        total = _weighted(on_grads, jnp.where(is_near_plus, plus, g)) + _weighted(on_change, plus - g)
        for weight, element in zip(on_elements, elements(g, plus, *others), strict=True):
            total = total + _weighted(weight, element)
        return total

    return trees.cast_like(trees.wide_map(leaf, grads, plus, *further), grads)


def _weighted(weight: Scalar, leaf: jax.Array) -> jax.Array:
    if not isinstance(weight, jax.Array):
        return weight * leaf if weight else jnp.zeros_like(leaf)
    return jnp.where(weight == 0, 0, weight.astype(leaf.dtype) * leaf)


def _is_zero(weight: Scalar) -> bool:
    return not isinstance(weight, jax.Array) and weight == 0
