"""A symmetric matrix on a Krylov space: a small symmetric matrix and the orthonormal basis it belongs to."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from crsam_jax import _trees as trees
from crsam_jax.curvature import _vectors
from crsam_jax.curvature._vectors import Basis, Product, Vector

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class Krylov(NamedTuple):
    """A ≈ 2^exponent · Q diag(values) Qᵀ on the Krylov space of the starting vector.

    Attributes:
      values: Ritz values in units of 2^exponent, ascending, [m], float64; NaN if a product was not finite.
      coordinates: eigenvectors of the small matrix as columns, [m, m]; the first row is the starting vector's share.
      basis: Q, orthonormal.
      exponent: the power of two that brings the first product's norm to about 1.
    """

    values: Array
    coordinates: Array
    basis: Basis
    exponent: int


def lanczos(product: Product, start: Vector, num_steps: int) -> Krylov:
    """Lanczos with full reorthogonalization for ``num_steps`` steps, or fewer if the Krylov space is exhausted before.

    Products are scaled by one power of two, so that float32 serves matrices of any size. The space counts as exhausted
    where the next basis vector would be rounding noise.
    """
    eps = float(jnp.finfo(trees.wide_dtype(start)).eps)
    basis = Basis(start, num_steps)
    vector = _vectors.unit(start)
    diagonal: list[float] = []
    beside: list[float] = []
    exponent = 0
    for step in range(num_steps):
        basis.append(vector)
        image = product(vector)
        if step == 0:
            exponent = exponent_of(image)
        rest, coefficients = basis.without_span(_vectors.shifted_by(image, -exponent))
        diagonal.append(float(coefficients[step]))
        length = _vectors.norm(rest)
        if not math.isfinite(length + diagonal[-1]):
            unknown = np.full(num_steps, math.nan)
            return Krylov(unknown, np.full((num_steps, num_steps), math.nan), basis, 0)
        if length <= 100 * eps * max(map(abs, [*diagonal, *beside, length])):
            break
        beside.append(length)
        vector = _vectors.unit(rest)
    beside = beside[: len(diagonal) - 1]
    values, coordinates = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, -1) + np.diag(beside, 1))
    return Krylov(values, coordinates, basis, exponent)


def exponent_of(image: Vector) -> int:
    """The exponent e for which ‖image‖ · 2^−e is in [1/2, 1); 0 if the image is zero or not finite."""
    return math.frexp(_vectors.norm(image))[1]
