"""The Hessian's spectrum: its largest eigenvalues with residuals, and its density with error bars."""

from typing import Any

import jax

from crsam_jax._loss import LossFn
from crsam_jax.ascents import Mask
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import Progress
from crsam_jax.curvature.objective import Objective
from crsam_jax.curvature.results import Eigenpairs, Spectrum


def top_eigenvalues(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_eigenvalues: int = 1,
    num_steps: int | None = None,
    matrix: str = "hessian",
    mask: Mask | None = None,
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
      matrix: ``"hessian"``, ``"gauss_newton"`` or ``"empirical_fisher"``, as for :func:`hessian_trace`.
      mask: the leaves to measure, as for :func:`hessian_trace`; n counts their numbers.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each matrix-vector product.

    Returns:
      :class:`Eigenpairs`, the largest first.

    Raises:
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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.top_eigenvalues(
        key=key,
        num_eigenvalues=num_eigenvalues,
        num_steps=num_steps,
        matrix=matrix,
        mask=mask,
        progress=progress,
    )


def smallest_eigenvalues(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_eigenvalues: int = 1,
    num_steps: int | None = None,
    matrix: str = "hessian",
    mask: Mask | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The algebraically smallest eigenvalues of the Hessian, by Lanczos from a random start.

    A negative one shows a direction in which the loss curves down: w is no minimum. Costs what :func:`top_eigenvalues`
    costs and takes the same arguments. The values are never below the true ones.

    Returns:
      :class:`Eigenpairs`, the smallest first.

    Raises:
      TypeError, ValueError: as :func:`top_eigenvalues`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 7.0, -9.0]) * w**2)
      >>> print(curvature.smallest_eigenvalues(loss_fn, jnp.zeros(3), key=jax.random.key(0)).values.round(4))
      [-9.]

    References:
      As :func:`top_eigenvalues`.
    """
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.smallest_eigenvalues(
        key=key,
        num_eigenvalues=num_eigenvalues,
        num_steps=num_steps,
        matrix=matrix,
        mask=mask,
        progress=progress,
    )


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
    matrix: str = "hessian",
    mask: Mask | None = None,
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
      matrix: ``"hessian"``, ``"gauss_newton"`` or ``"empirical_fisher"``, as for :func:`hessian_trace`.
      mask: the leaves to measure, as for :func:`hessian_trace`; n counts their numbers.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each matrix-vector product.

    Returns:
      A :class:`Spectrum`. The error bars cover the random probes, not the smoothing nor the bias of a small num_steps.

    Raises:
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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.hessian_spectrum(
        key=key,
        num_probes=num_probes,
        num_steps=num_steps,
        grid=grid,
        width=width,
        matrix=matrix,
        mask=mask,
        progress=progress,
    )
