"""The one pass over the leaves after the probes: inner products of a step's gradients, and what follows from them."""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.trees import ScaledNorm
from crsam_jax.step.types import Params, Scalar
from crsam_jax.step.vectors import Elements, Vector


class Products(NamedTuple):
    """Inner products of the trees of a basis, in a unit in which their squares are in range.

    Attributes:
      gram: ⟨bᵢ, bⱼ⟩ · 4^exponent, a symmetric table.
      with_direction: ⟨v, bᵢ⟩ · 2^exponent.
      direction_norm: ‖v‖.
      exponent: the unit: trees are multiplied by 2^exponent, which brings g to an ordinary size.
    """

    gram: Sequence[Sequence[jax.Array]]
    with_direction: Sequence[jax.Array]
    direction_norm: jax.Array
    exponent: jax.Array

    def norm(self, vector: Vector) -> jax.Array:
        """‖vector‖ over the whole tree; not finite if the vector is not."""
        return jnp.ldexp(self._scaled_norm(vector), -self.exponent)

    def along(self, vector: Vector) -> jax.Array:
        """The inner product ⟨v, vector⟩."""
        return jnp.ldexp(_total(vector.weights, self.with_direction), -self.exponent)

    def projection(self, vector: Vector, onto: Vector) -> jax.Array:
        """⟨vector, onto⟩/‖onto‖²; 0 where ``onto`` is zero."""
        return trees.safe_ratio(self._dot(vector, onto), self._dot(onto, onto))

    def ratio(self, vector: Vector, to: Vector) -> jax.Array:
        """‖vector‖/‖to‖; 0 where ``vector`` is zero."""
        above, below = self._scaled_norm(vector), self._scaled_norm(to)
        is_zero = above == 0
        return jnp.where(is_zero, 0, above / jnp.where(is_zero, 1, below))

    def cosine(self, a: Vector, b: Vector) -> jax.Array:
        """⟨a, b⟩/(‖a‖‖b‖); 0 where either is zero or not finite."""
        lengths = self._scaled_norm(a) * self._scaled_norm(b)
        return trees.safe_ratio(self._dot(a, b), jnp.where(jnp.isfinite(lengths), lengths, 0))

    def largest(self, vector: Vector) -> jax.Array:
        """No element of the vector, nor of what is added up on the way to it, is larger than this."""
        lengths = [trees.safe_sqrt(row[i]) for i, row in enumerate(self.gram)]
        sizes = [jnp.abs(jnp.asarray(weight)) for weight in vector.weights]
        return jnp.ldexp(_total(sizes, lengths), -self.exponent)

    def _dot(self, a: Vector, b: Vector) -> jax.Array:
        return _total(a.weights, [_total(b.weights, row) for row in self.gram])

    def _scaled_norm(self, vector: Vector) -> jax.Array:
        return trees.safe_sqrt(self._dot(vector, vector))


def products_of(
    elements: Elements, size: int, grads: Sequence[Params], grad_norm: ScaledNorm, direction: Params | None
) -> Products:
    """Products of the basis (g, g⁺ − g, *elements).

    Args:
      elements: the elements of the basis, computed from the gradients.
      size: how many trees the basis has in all.
      grads: g, g⁺ and the further gradients.
      grad_norm: ‖g‖, which is known already and sets the unit.
      direction: v, or None for v = g/‖g‖, which needs no products of its own.
    """
    dtype = grad_norm.length.dtype
    exponent = _unit(grad_norm)
    one = jnp.ones((), dtype)
    pairs = list(combinations_with_replacement(range(size), 2))[1:]  # all but ⟨g, g⟩, which is known

    def terms(g: jax.Array, plus: jax.Array, *others: jax.Array) -> list[jax.Array]:
        further, along = others[: len(grads) - 2], others[len(grads) - 2 :]
        scaled = [x * jnp.ldexp(one, exponent) for x in (g, plus - g, *elements(g, plus, *further))]
        return [*(scaled[i] * scaled[j] for i, j in pairs), *(v * x for v in along for x in [*scaled, v])]

    directions = () if direction is None else (direction,)
    found = trees.sums(terms, *grads, *directions)
    length = jnp.ldexp(grad_norm.length, exponent - grad_norm.exponent)  # the length of g in that unit
    table = {(0, 0): length**2, **dict(zip(pairs, found, strict=False))}
    gram = [[table[min(i, j), max(i, j)] for j in range(size)] for i in range(size)]
    if direction is None:
        divisor = jnp.where(grad_norm.is_usable, length, 1)
        return Products(gram, [jnp.where(grad_norm.is_usable, x / divisor, 0) for x in gram[0]], one, exponent)
    *with_direction, square = found[len(pairs) :]
    return Products(gram, with_direction, trees.safe_sqrt(square), exponent)


def _unit(grad_norm: ScaledNorm) -> jax.Array:
    """The exponent that brings g far enough below 1 for larger gradients, and not too far for smaller ones."""
    largest = jnp.finfo(grad_norm.length.dtype).maxexp
    _, exponent = jnp.frexp(grad_norm.length)
    shift = -largest // 4 - (exponent - grad_norm.exponent)
    return jnp.where(grad_norm.is_usable, jnp.clip(shift, -largest + 3, largest // 2), 0)


def _total(weights: Sequence[Scalar], values: Sequence[jax.Array]) -> jax.Array:
    """Σ wᵢxᵢ over the weights that are not zero."""
    total = jnp.zeros((), values[0].dtype)
    for weight, value in zip(weights, values, strict=True):
        if isinstance(weight, jax.Array):
            total = total + jnp.where(weight == 0, 0, weight * value)
        elif weight:
            total = total + weight * value
    return total
