"""The Hessian on a Krylov space: a small symmetric matrix and the orthonormal basis it belongs to."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax.curvature import _matfree


class Krylov(NamedTuple):
    """A ≈ Qᵀ diag(values) Q on the Krylov space of the starting vector, ascending Ritz values.

    Attributes:
      values: Ritz values, [m], float64.
      coordinates: eigenvectors of the small matrix as columns, [m, m]; the first row is the starting vector's share.
      basis: Q, orthonormal rows, [m, n].
    """

    values: np.ndarray[Any, np.dtype[np.floating[Any]]]
    coordinates: np.ndarray[Any, np.dtype[np.floating[Any]]]
    basis: jax.Array


def lanczos(product: _matfree.Product, start: jax.Array, num_steps: int) -> Krylov:
    """Lanczos with full reorthogonalization for ``num_steps`` steps, or fewer if the Krylov space is exhausted before.

    matfree goes on past an exhausted space with directions made of rounding noise, which need not be orthogonal;
    what comes from there is cut off, at the first subdiagonal that is zero up to rounding.
    """
    decomp = _matfree.load("decomp")
    algorithm = decomp.hessenberg(num_steps, reortho="full", custom_vjp=False)
    result = _matfree.run_eagerly(algorithm, product, start)
    small = np.asarray(result.J_small, np.float64)
    size = _sound_size(small, float(jnp.finfo(start.dtype).eps))
    small = small[:size, :size]
    tridiagonal = np.diag(np.diag(small)) + np.diag(np.diag(small, -1), -1) + np.diag(np.diag(small, -1), 1)
    values, coordinates = np.linalg.eigh(tridiagonal)
    return Krylov(values, coordinates, result.Q_tall[:size])


def _sound_size(small: Any, eps: float) -> int:
    """How many steps there were until the next basis vector was rounding noise (or NaN, from 0/0)."""
    subdiagonal = np.diag(small, -1)
    for step, length in enumerate(subdiagonal):
        scale = np.max(np.abs(small[: step + 2, : step + 1]))
        if not length > 100 * eps * scale:
            return step + 1
    return len(small)
