"""The Hessian's trace, with its standard error, and the paper's normalized trace."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from crsam_jax import _trees as trees
from crsam_jax._checks import check_choice, check_number, check_whole_number
from crsam_jax._loss import LossFn
from crsam_jax.curvature import _matfree
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import MeanLoss, Progress, widened_params
from crsam_jax.curvature._xtrace import xtrace
from crsam_jax.curvature.hessian import flat_hessian

ESTIMATORS = ("rademacher", "gaussian", "xtrace")

# A standard error from fewer probes is too rough to stop on.
_FEWEST_PROBES_TO_STOP = 10


class Estimate(NamedTuple):
    """A Monte-Carlo estimate.

    Attributes:
      mean: the estimate, a float.
      standard_error: the standard error of the mean, a float: the root of an unbiased estimate of its variance, which
        for independent samples is the sample variance over num_probes. With few probes it is itself uncertain, by
        about 1/√(2 num_probes): an interval for the truth is mean ± q · standard_error with q of Student's distribution
        of num_probes − 1 degrees of freedom.
      num_probes: how many samples it rests on.
    """

    mean: float
    standard_error: float
    num_probes: int


class NormalizedTrace(NamedTuple):
    """The normalized trace C(w) = Tr ∇²L(w)/‖∇L(w)‖.

    Attributes:
      mean: C(w), a float; infinite or NaN where the gradient is zero.
      standard_error: the standard error of C(w): that of the trace, divided by ‖∇L‖, which is exact.
      trace: the trace with its own standard error.
      gradient_norm: ‖∇L(w)‖.
    """

    mean: float
    standard_error: float
    trace: Estimate
    gradient_norm: float


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_probes: int = 32,
    estimator: str = "rademacher",
    relative_standard_error: float | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Estimate:
    r"""The trace of the Hessian, :math:`\operatorname{Tr} \nabla^2 L(w) = \mathbb{E}_z\, z^\top \nabla^2 L(w)\, z`.

    z has independent entries of mean 0 and variance 1. Costs one Hessian-vector product a probe, two with XTrace.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays, n numbers in all.
      data: a batch or an iterable of batches.
      key: a JAX random key; the same key gives the same probes.
      num_probes: how many probes, at least 2; with ``relative_standard_error`` the most that are spent.
      estimator: ``"rademacher"``: signs, the least variance of the plain estimators for large n; ``"gaussian"``: normal
        entries; ``"xtrace"``: Gaussian probes that also span a low-rank approximation, whose trace is taken
        exactly. XTrace's error falls faster where few eigenvalues dominate. It holds 4 ``num_probes`` vectors of n
        numbers, and from ``2 num_probes >= n`` on it sums up the diagonal: the error is then 0. All its probes share
        one approximation, and the standard error allows for that. It is rather too large, by a factor of about two,
        where each eigenvalue is half the one before.
      relative_standard_error: stop once standard error/\|mean\| is at most this; looked at after each probe
        from the tenth on. Not with XTrace, whose probes act together. Stopping on an error favours errors that came
        out small: the true one is some 1.2 times larger if it stops at about twenty probes, hardly so at a hundred
        and more. None: spend all probes.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each Hessian-vector product, that is each pass over data.

    Returns:
      An :class:`Estimate`. The error is that of random probes; it does not cover the choice of the data.

    Raises:
      ImportError: if matfree, the extra ``curvature``, is not installed.
      TypeError, ValueError: as :func:`gradient_norm`, or for a bad number or name.

    Example:
      Rademacher probes are exact on a diagonal Hessian:

      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> curvature.hessian_trace(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]), key=jax.random.key(0), num_probes=4)
      Estimate(mean=60.0, standard_error=0.0, num_probes=4)

    References:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines", 1989; Epperly, Tropp, Webber, "XTrace", SIAM J. Matrix Anal. Appl. 45, 2024.
    """
    _check_trace_arguments(num_probes, estimator, relative_standard_error)
    params = widened_params(params)
    flat, _ = ravel_pytree(params)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    if estimator == "xtrace":
        product = flat_hessian(loss, params, min(2 * num_probes, flat.size), progress)
        return _xtrace(product, flat, key, num_probes)
    product = flat_hessian(loss, params, num_probes, progress)
    return _hutchinson(product, flat, key, num_probes, estimator, relative_standard_error)


def normalized_hessian_trace(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_probes: int = 32,
    estimator: str = "rademacher",
    relative_standard_error: float | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> NormalizedTrace:
    r"""The paper's normalized Hessian trace, :math:`C(w) = \operatorname{Tr} \nabla^2 L(w) / \|\nabla L(w)\|`.

    It has the unit of 1/‖w‖. Costs :func:`hessian_trace` and one gradient.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches.
      key: a JAX random key.
      num_probes: how many probes at most, at least 2.
      estimator: ``"rademacher"``, ``"gaussian"`` or ``"xtrace"``.
      relative_standard_error: stop early at this relative standard error.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch.
      progress: called as ``progress(done, total)`` after each Hessian-vector product.

    Returns:
      A :class:`NormalizedTrace`.

    Raises:
      ImportError, TypeError, ValueError: as :func:`hessian_trace`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> result = curvature.normalized_hessian_trace(loss_fn, jnp.array([3.0, 4.0]), key=jax.random.key(0))
      >>> result.mean, result.gradient_norm  # 2/5
      (0.4, 5.0)

    References:
      Wu et al., "CR-SAM", AAAI 2024, eq. 4.
    """
    trace = hessian_trace(
        loss_fn,
        params,
        data,
        key=key,
        num_probes=num_probes,
        estimator=estimator,
        relative_standard_error=relative_standard_error,
        has_aux=has_aux,
        example_count=example_count,
        progress=progress,
    )
    params = widened_params(params)
    norm = float(trees.norm(MeanLoss(loss_fn, data, has_aux, example_count).gradient(params)))
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, error = np.array([trace.mean, trace.standard_error]) / norm
    return NormalizedTrace(float(mean), float(error), trace, norm)


def estimate(samples: Any) -> Estimate:
    """Mean and standard error of independent samples, in float64."""
    values = np.asarray(samples, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)), values.size)


def is_precise(so_far: list[Any], relative_standard_error: float | None) -> bool:
    """Whether there are enough samples, and their mean is known to the precision that was asked for."""
    if relative_standard_error is None or len(so_far) < _FEWEST_PROBES_TO_STOP:
        return False
    result = estimate(so_far)
    return result.standard_error <= relative_standard_error * abs(result.mean)


def _hutchinson(
    product: Callable[[jax.Array], jax.Array],
    like: jax.Array,
    key: jax.Array,
    num_probes: int,
    estimator: str,
    relative_standard_error: float | None,
) -> Estimate:
    stochtrace = _matfree.load("stochtrace")
    sampler = {"rademacher": stochtrace.sampler_signs, "gaussian": stochtrace.sampler_normal}[estimator](like, num=1)
    integrand = stochtrace.monte_carlo_trace()
    samples: list[jax.Array] = []
    for probe_key in jax.random.split(key, num_probes):
        samples.append(integrand(product, sampler(probe_key)[0]))
        if is_precise(samples, relative_standard_error):
            break
    return estimate(samples)


def _xtrace(product: Callable[[jax.Array], jax.Array], like: jax.Array, key: jax.Array, num_probes: int) -> Estimate:
    num_probes = min(num_probes, like.size)
    mean, variance = xtrace(product, jax.random.normal(key, (num_probes, like.size), like.dtype))
    return Estimate(mean, math.sqrt(variance), num_probes)


def _check_trace_arguments(num_probes: int, estimator: str, relative_standard_error: float | None) -> None:
    check_whole_number("num_probes", num_probes, at_least=2)
    check_choice("estimator", estimator, ESTIMATORS)
    if relative_standard_error is not None:
        check_number("relative_standard_error", relative_standard_error)
        if estimator == "xtrace":
            raise ValueError("relative_standard_error cannot stop XTrace early: leave it out, or choose num_probes.")
