"""XTrace: every probe is both part of a low-rank approximation and, left out of it, a sample of the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def xtrace(product: Callable[[jax.Array], jax.Array], probes: jax.Array) -> tuple[float, float]:
    r"""The trace of a symmetric matrix A and the variance of that estimate.

    The estimate is the mean of :math:`t_i = \operatorname{Tr} Q_i^\top A Q_i + s_i\, \tilde\omega_i^\top A \tilde
    \omega_i`, where :math:`Q_i` spans the images Aω of all probes but ω_i, :math:`\tilde\omega_i` is ω_i less its part
    in :math:`Q_i`, and s_i brings its squared length to that of the space left.

    Given the other probes, the mean of t_i over ω_i is the trace. So t_i and t_j are correlated only by what each gains
    from the other as part of its basis: with u_ij = t_i less its value without ω_j in the basis,
    E[u_ij u_ji] = cov(t_i, t_j). That makes the variance estimate, (the sample variance of t)/m + mean u_ij u_ji,
    unbiased. It costs no further product. Where the mean of u_ij u_ji is negative it counts as 0.

    Args:
      product: v ↦ Av for vectors of shape [n].
      probes: Gaussian, [m, n], at least 2 of them.

    Returns:
      Both as floats; with 2m ≥ n the sum of the diagonal and 0, at n products instead of 2m.

    References:
      Epperly, Tropp, Webber, "XTrace", SIAM J. Matrix Anal. Appl. 45, 2024.
    """
    count, size = probes.shape
    if 2 * count >= size:
        return sum(float(product(unit)[i]) for i, unit in enumerate(jnp.eye(size, dtype=probes.dtype))), 0.0
    problem = _compressed(product, probes)
    pivots = np.abs(np.diag(problem.images))
    if pivots.min() <= np.finfo(np.float64).eps * pivots.max():  # the basis holds all of A
        return float(np.trace(problem.compressed)), 0.0

    normals = np.linalg.inv(problem.images)  # row i is orthogonal to all images but that of probe i
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    estimates = np.array([_estimate(problem, i, normals[i][None]) for i in range(count)])
    gains = np.array([estimates[i] - _estimate(problem, i, _pairs(normals, i)) for i in range(count)])
    np.fill_diagonal(gains, 0.0)
    covariance = np.sum(gains * gains.T) / (count * (count - 1))
    return float(estimates.mean()), float(estimates.var(ddof=1) / count + np.maximum(covariance, 0.0))


def _compressed(product: Callable[[jax.Array], jax.Array], probes: jax.Array) -> _Problem:
    basis, images = jnp.linalg.qr(jnp.stack([product(probe) for probe in probes], axis=1))
    basis_images = jnp.stack([product(column) for column in basis.T])
    return _Problem(
        size=probes.shape[1],
        compressed=_product(basis_images, basis),
        images=np.asarray(images, np.float64),
        probes=_product(basis.T, probes.T),
        squares=np.asarray(jnp.sum(probes**2, axis=1), np.float64),
    )


def _product(a: jax.Array, b: jax.Array) -> Array:
    return np.asarray(jnp.matmul(a, b, precision="highest"), np.float64)


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
