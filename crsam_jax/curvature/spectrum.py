"""The Hessian's spectrum: its largest eigenvalues with residuals, and its density with error bars."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from crsam_jax._checks import check_number, check_whole_number
from crsam_jax._loss import LossFn
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._lanczos import Krylov, lanczos
from crsam_jax.curvature._mean_loss import MeanLoss, Progress, widened_params
from crsam_jax.curvature.hessian import flat_hessian

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class Eigenpairs(NamedTuple):
    """The k largest eigenvalues that were found.

    Attributes:
      values: λ₁ ≥ ... ≥ λ_k, [k], float64.
      residuals: ‖∇²L v_i − λ_i v_i‖, [k], float64: an eigenvalue lies within this distance of λ_i.
      vectors: the unit eigenvectors v_i, a list of k pytrees like params.
    """

    values: Array
    residuals: Array
    vectors: list[Any]


class Spectrum(NamedTuple):
    """The density of eigenvalues, φ(t) = (1/n) Σ_i N(t; λ_i, width²), and the quadrature it comes from.

    Attributes:
      grid: the points t, [g], float64.
      density: φ(t), the mean over probes, [g]; it integrates to 1 over the whole line.
      standard_error: the standard error of the density, over probes, [g]; see :func:`hessian_spectrum`.
      nodes: Ritz values, [num_probes, num_steps].
      weights: their weights, [num_probes, num_steps], rows adding up to 1: Σ_j weights f(nodes) estimates
        (1/n) Tr f(∇²L) for each probe. Steps that a probe did not need have weight 0.
    """

    grid: Array
    density: Array
    standard_error: Array
    nodes: Array
    weights: Array


def top_eigenvalues(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_eigenvalues: int = 1,
    num_steps: int | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The algebraically largest eigenvalues of the Hessian, by Lanczos from a random start.

    Costs ``num_steps + num_eigenvalues`` Hessian-vector products, the latter for the residuals. Lanczos finds one
    vector of each eigenspace: multiplicities do not show. The values never exceed the true ones.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays, n numbers in all.
      data: a batch or an iterable of batches.
      key: a JAX random key, for the start.
      num_eigenvalues: k, at least 1 and at most n.
      num_steps: the number of steps of Lanczos, at least k; more make the residuals smaller. Memory: as many vectors of
        n numbers. None: 20 + 5k, or n if that is less.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each Hessian-vector product.

    Returns:
      :class:`Eigenpairs`, the largest first.

    Raises:
      ImportError: if matfree, the extra ``curvature``, is not installed.
      TypeError, ValueError: as :func:`gradient_norm`, for a bad number, or if there are fewer than k distinct
        eigenvalues to find.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 7.0, -9.0]) * w**2)
      >>> pairs = curvature.top_eigenvalues(loss_fn, jnp.zeros(3), key=jax.random.key(0), num_eigenvalues=2)
      >>> print(pairs.values.round(4), (pairs.residuals < 1e-4).all())
      [7. 1.] True

    References:
      Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950; Parlett, "The Symmetric
      Eigenvalue Problem", 1980, theorem 4.5.1 for the residual bound.
    """
    check_whole_number("num_eigenvalues", num_eigenvalues, at_least=1)
    params = widened_params(params)
    flat, unravel = ravel_pytree(params)
    if num_steps is None:
        num_steps = min(20 + 5 * num_eigenvalues, flat.size)
    _check_steps(num_steps, flat.size, at_least=num_eigenvalues)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    product = flat_hessian(loss, params, num_steps + num_eigenvalues, progress)

    krylov = lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), num_steps)
    if len(krylov.values) < num_eigenvalues:
        raise ValueError(
            f"num_eigenvalues is {num_eigenvalues}, but the Hessian has only {len(krylov.values)} distinct eigenvalues "
            "up to rounding; ask for fewer."
        )
    values = krylov.values[::-1][:num_eigenvalues]
    coordinates = jnp.asarray(krylov.coordinates[:, ::-1][:, :num_eigenvalues], flat.dtype)
    vectors = [_unit(column @ krylov.basis) for column in coordinates.T]
    residuals = [
        float(jnp.linalg.norm(product(vector) - value.astype(flat.dtype) * vector))
        for value, vector in zip(values, vectors, strict=True)
    ]
    return Eigenpairs(values, np.array(residuals), [unravel(vector) for vector in vectors])


def hessian_spectrum(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_probes: int = 8,
    num_steps: int | None = None,
    grid: Any = 1000,
    width: float | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    For each of several Gaussian vectors z Lanczos gives a Gauss quadrature of the measure
    :math:`\sum_i (u_i^\top z)^2 \delta_{\lambda_i} / \|z\|^2`, whose expectation is the spectrum, u_i the
    eigenvectors. The nodes are then smoothed with a Gaussian of the given width. Costs ``num_probes · num_steps``
    Hessian-vector products.

    The variance of one probe's density at t is taken as the larger of two: that of the sample over probes, which covers
    nodes that wander from probe to probe, and that of the measure itself, whose shares (u_iᵀz)²/‖z‖² have Dirichlet's
    distribution: with f_i the bump around λ_i at t,

    .. math:: \operatorname{Var} = \tfrac{2}{n+2} \big(\tfrac1n \textstyle\sum_i f_i^2 - (\tfrac1n \sum_i f_i)^2 \big),

    both means estimated by the quadrature. The sample's variance alone is skewed: with few probes it is mostly too
    small. Where num_steps is so small that nodes have not settled within a width, few probes are still too few for
    their spread.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays, n numbers in all.
      data: a batch or an iterable of batches.
      key: a JAX random key.
      num_probes: how many vectors z, at least 2.
      num_steps: the number of steps of Lanczos, at most n; exact for polynomials up to degree 2 num_steps − 1.
        None: 40, or n if that is less.
      grid: where to evaluate the density, an array; or a number of points, spread evenly over the range of the nodes,
        widened by four widths at both ends.
      width: standard deviation of the smoothing Gaussian, > 0, in units of the eigenvalues. None: 1 % of the range of
        the nodes, at least 1e-4 of the largest of them in size; 1 if all are 0.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each Hessian-vector product.

    Returns:
      A :class:`Spectrum`. The error bars cover the random probes, not the smoothing nor the bias of a small num_steps.

    Raises:
      ImportError: if matfree, the extra ``curvature``, is not installed.
      TypeError, ValueError: as :func:`gradient_norm`, or for a bad number or grid.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 5.0) * w**2)
      >>> spectrum = curvature.hessian_spectrum(loss_fn, jnp.zeros(4), key=jax.random.key(0))
      >>> print(spectrum.nodes[0].round(3), round(float(np.trapezoid(spectrum.density, spectrum.grid)), 3))
      [1. 2. 3. 4.] 1.0

    References:
      Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", ICML
      2019, algorithm 1; Golub, Welsch, "Calculation of Gauss quadrature rules", 1969.
    """
    check_whole_number("num_probes", num_probes, at_least=2)
    params = widened_params(params)
    flat, _ = ravel_pytree(params)
    num_steps = min(40, flat.size) if num_steps is None else num_steps
    _check_steps(num_steps, flat.size, at_least=1)
    grid = _checked_grid(grid)
    _check_width(width)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    product = flat_hessian(loss, params, num_probes * num_steps, progress)

    keys = jax.random.split(key, num_probes)
    starts = (jax.random.normal(probe_key, flat.shape, flat.dtype) for probe_key in keys)
    nodes, weights = _quadrature([lanczos(product, start, num_steps) for start in starts], num_steps)
    return _smoothed(nodes, weights, grid, width, flat.size)


def _quadrature(krylovs: list[Krylov], num_steps: int) -> tuple[Array, Array]:
    """Nodes and weights of each probe; what an exhausted Krylov space lacks is filled with weight 0."""
    nodes = [np.pad(k.values, (0, num_steps - len(k.values)), mode="edge") for k in krylovs]
    weights = [np.pad(k.coordinates[0] ** 2, (0, num_steps - len(k.values))) for k in krylovs]
    return np.stack(nodes), np.stack(weights)


def _smoothed(nodes: Array, weights: Array, grid: int | Array, width: float | None, size: int) -> Spectrum:
    low, high = nodes.min(), nodes.max()
    if width is None:
        width = max(0.01 * (high - low), 1e-4 * float(np.max(np.abs(nodes)))) or 1.0
    points = np.linspace(low - 4 * width, high + 4 * width, grid) if isinstance(grid, int) else grid
    densities, squares = [], []
    for node, weight in zip(nodes, weights, strict=True):
        bumps = np.exp(-0.5 * ((points[:, None] - node) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        densities.append(bumps @ weight)
        squares.append(bumps**2 @ weight)
    density = np.mean(densities, axis=0)
    of_measures = 2 / (size + 2) * np.maximum(np.mean(squares, axis=0) - density**2, 0.0)
    variance = np.maximum(np.var(densities, axis=0, ddof=1), of_measures) / len(densities)
    return Spectrum(points, density, np.sqrt(variance), nodes, weights)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.linalg.norm(vector)


def _check_steps(num_steps: int, size: int, *, at_least: int) -> None:
    check_whole_number("num_steps", num_steps, at_least=at_least)
    if num_steps > size:
        raise ValueError(f"num_steps is {num_steps}, but there are only {size} parameters to take steps in.")


def _check_width(width: float | None) -> None:
    if width is not None:
        check_number("width", width)
        if width == 0:
            raise ValueError("width must be positive: the unsmoothed density is a sum of spikes; see nodes, weights.")


def _checked_grid(grid: Any) -> int | Array:
    if isinstance(grid, int) and not isinstance(grid, bool):
        check_whole_number("grid", grid, at_least=2)
        return grid
    points = np.asarray(grid, np.float64)
    if points.ndim != 1 or not points.size or not np.all(np.isfinite(points)):
        raise ValueError(f"grid must be a number of points or a vector of finite numbers, got shape {points.shape}.")
    return points
