"""XTrace: every probe is both part of a low-rank approximation and, left out of it, a sample of the rest."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax import _trees as trees
from crsam_jax.curvature import _vectors
from crsam_jax.curvature._lanczos import exponent_of
from crsam_jax.curvature._vectors import Basis, Product, Vector

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class _Problem(NamedTuple):
    """A symmetric matrix A of n rows, seen from the basis Q of AΩ, Ω the probes: all that is needed, in float64.

    Attributes:
      size: n.
      compressed: QᵀAQ, [m, m].
      images: QᵀAΩ, [m, m], upper triangular.
      probes: QᵀΩ, [m, m].
      squares: the squared length of each probe, [m].
    """

    size: int
    compressed: Array
    images: Array
    probes: Array
    squares: Array


def xtrace(product: Product, probes: list[Vector]) -> tuple[float, float]:
    r"""The trace of a symmetric matrix A and the variance of that estimate.

    The estimate is the mean of :math:`t_i = \operatorname{Tr} Q_i^\top A Q_i + s_i\, \tilde\omega_i^\top A \tilde
    \omega_i`, where :math:`Q_i` spans the images Aω of all probes but ω_i, :math:`\tilde\omega_i` is ω_i less its part
    in :math:`Q_i`, and s_i brings its squared length to that of the space left.

    Given the other probes, the mean of t_i over ω_i is the trace. So t_i and t_j are correlated only by what each gains
    from the other as part of its basis: with u_ij = t_i less its value without ω_j in the basis,
    E[u_ij u_ji] = cov(t_i, t_j). That makes the variance estimate, (the sample variance of t)/m + mean u_ij u_ji,
    unbiased. It costs no further product. Where the mean of u_ij u_ji is negative it counts as 0.

    Args:
      product: v ↦ Av.
      probes: Gaussian, m vectors of n elements, at least 2 of them.

    Returns:
      (trace, variance), NaN if a product is not finite. With 2m ≥ n the exact trace and 0, at n products instead of 2m.

    References:
      Epperly, Tropp, Webber, "XTrace", SIAM J. Matrix Anal. Appl. 45, 2024.
    """
    count, size = len(probes), _vectors.size(probes[0])
    if 2 * count >= size:
        return _diagonal_sum(product, probes[0]), 0.0
    problem, exponent = _compressed(product, probes)
    if not np.all(np.isfinite(problem.images)) or not np.all(np.isfinite(problem.compressed)):
        return math.nan, math.nan
    if np.diag(problem.images).min() == 0:  # the basis holds all of A
        return float(np.ldexp(np.trace(problem.compressed), exponent)), 0.0

    normals = np.linalg.inv(problem.images)  # row i is orthogonal to all images but that of probe i
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    estimates = np.array([_estimate(problem, i, normals[i][None]) for i in range(count)])
    gains = np.array([estimates[i] - _estimate(problem, i, _pairs(normals, i)) for i in range(count)])
    np.fill_diagonal(gains, 0.0)
    covariance = np.sum(gains * gains.T) / (count * (count - 1))
    variance = estimates.var(ddof=1) / count + np.maximum(covariance, 0.0)
    return float(np.ldexp(estimates.mean(), exponent)), float(np.ldexp(variance, 2 * exponent))


def _diagonal_sum(product: Product, like: Vector) -> float:
    """Σᵢ eᵢᵀAeᵢ over all unit vectors eᵢ."""
    total = 0.0
    for position, leaf in enumerate(like):
        for index in np.ndindex(leaf.shape):
            unit = [np.zeros(other.shape, other.dtype) for other in like]
            unit[position][index] = 1
            vector = tuple(map(_vectors.placed_like, map(jnp.asarray, unit), like))
            total += float(_vectors.dots_by_leaf(vector, product(vector))[position])
    return total


def _compressed(product: Product, probes: list[Vector]) -> tuple[_Problem, int]:
    """The problem in units of 2^exponent, and the exponent. A probe whose image adds nothing has an empty column."""
    count = len(probes)
    eps = float(jnp.finfo(trees.wide_dtype(probes[0])).eps)
    basis, images, exponent = Basis(probes[0], count), np.zeros((count, count)), 0
    for i, probe in enumerate(probes):
        image = product(probe)
        exponent = exponent_of(image) if i == 0 else exponent
        scaled = _vectors.shifted_by(image, -exponent)
        rest, images[:, i] = basis.without_span(scaled)
        pivot = _vectors.norm(rest)
        images[i, i] = 0.0 if pivot <= 10 * eps * _vectors.norm(scaled) else pivot
        basis.append(_vectors.unit(rest) if images[i, i] else jax.tree.map(jnp.zeros_like, rest))
    compressed = [basis.coefficients(_vectors.shifted_by(product(basis[i]), -exponent)) for i in range(count)]
    problem = _Problem(
        size=_vectors.size(probes[0]),
        compressed=np.stack(compressed),
        images=images,
        probes=np.stack([basis.coefficients(probe) for probe in probes], axis=1),
        squares=np.array([_vectors.norm(probe) ** 2 for probe in probes]),
    )
    return problem, exponent


def _pairs(normals: Array, i: int) -> Array:
    """Orthonormal bases of the planes of normal i and normal j, [j, 2, m]; for j = i the second vector is zero."""
    others = normals
    for _ in range(2):  # the second time removes what rounding left
        others = others - (others @ normals[i])[:, None] * normals[i]
        lengths = np.linalg.norm(others, axis=1, keepdims=True)
        others = others / np.where(lengths > 0, lengths, 1.0)
    return np.stack([np.broadcast_to(normals[i], others.shape), others], axis=1)


def _estimate(problem: _Problem, i: int, removed: Array) -> Array:
    """The estimate of probe i over the basis without the directions ``removed``, orthonormal rows [..., k, m]."""
    size, compressed, images, probes, squares = problem
    probe, image = probes[:, i], images[:, i]
    inside = probe - np.einsum("...km,...k->...m", removed, removed @ probe)
    held = np.trace(compressed) - np.einsum("...km,...km->...", removed @ compressed, removed)
    rest = (probe - 2 * inside) @ image + np.sum((inside @ compressed) * inside, axis=-1)
    space_left = size - (len(probe) - removed.shape[-2])
    estimates: Array = held + space_left / (squares[i] - np.sum(inside**2, axis=-1)) * rest
    return estimates
