"""How much the loss rises nearby: at worst, by gradient ascent, and on average, under Gaussian noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax._checks import check_number, check_whole_number
from crsam_jax._loss import LossFn
from crsam_jax.curvature._ascend import ascend, check_ascent_arguments, shifted
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import MeanLoss, Progress, widened_params
from crsam_jax.curvature.trace import Estimate, estimate, is_precise

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class WorstCaseSharpness(NamedTuple):
    """The largest rise of the loss that gradient ascent found in the ball.

    Attributes:
      value: max of ``losses`` − L(w) ≥ 0, a float; a lower bound of the true maximum, as ascent is local.
      losses: the loss along the path, from L(w) at the start to the last point, [num_steps + 1], float64.
    """

    value: float
    losses: Array


class AverageSharpness(NamedTuple):
    """The mean rise of the loss under Gaussian noise.

    Attributes:
      mean: a float; may be negative.
      standard_error: the standard error of the mean over the draws of the noise.
      num_probes: how many draws.
      loss: L(w).
    """

    mean: float
    standard_error: float
    num_probes: int
    loss: float


def worst_case_sharpness(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    rho: float,
    num_steps: int = 20,
    step_size: float | None = None,
    adaptive: bool = False,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> WorstCaseSharpness:
    r"""The worst-case sharpness :math:`\max_{\|T^{-1}\delta\| \le \rho} L(w + \delta) - L(w)`, by gradient ascent.

    T = I, or diag(\|w\|) if adaptive. With δ = T u each step moves u by ``step_size`` along the unit vector of
    T ∇L(w + T u) and projects onto ‖u‖ ≤ ρ. One δ serves the whole data set. Costs ``num_steps`` gradients and a loss.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches.
      rho: ρ > 0, the radius, in the unit of params; relative to \|w\| if adaptive.
      num_steps: the number of steps of the ascent, at least 1.
      step_size: > 0, the length of a step in u. None: ρ/num_steps, so that one step is SAM's perturbation.
      adaptive: scale by \|w\|: invariant under rescaling of weights that leaves a ReLU network unchanged.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each gradient or loss, that is each pass over data.

    Returns:
      A :class:`WorstCaseSharpness`.

    Raises:
      TypeError, ValueError: as :func:`gradient_norm`, or for a bad number.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> result = curvature.worst_case_sharpness(lambda w: 0.5 * jnp.sum(w**2), jnp.array([3.0, 4.0]), rho=1.0)
      >>> round(result.value, 4)  # (6² − 5²)/2
      5.5

    References:
      Foret et al., "Sharpness-Aware Minimization", ICLR 2021, eq. 1; Kwon et al., "ASAM", ICML 2021, definition 2.
    """
    check_ascent_arguments(rho, num_steps, step_size)
    params = widened_params(params)
    scale = _scale(params, adaptive)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    losses: list[float] = []

    def seen(value: float) -> None:
        losses.append(value)
        if progress is not None:
            progress(len(losses), num_steps + 1)

    def gradient_at(offset: Any) -> Any:
        value, gradient = loss.value_and_grad(shifted(params, _scaled(scale, offset)))
        seen(value)
        return _scaled(scale, gradient)

    offset = ascend(gradient_at, jax.tree.map(jnp.zeros_like, params), rho, num_steps, step_size)
    seen(loss.value(shifted(params, _scaled(scale, offset))))
    return WorstCaseSharpness(max(losses) - losses[0], np.array(losses))


def average_sharpness(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    sigma: float,
    key: jax.Array,
    num_probes: int = 32,
    relative_standard_error: float | None = None,
    adaptive: bool = False,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> AverageSharpness:
    r"""The average-case sharpness :math:`\mathbb{E}\, L(w + \sigma T \varepsilon) - L(w)`, ε ~ N(0, I).

    T = I, or diag(\|w\|) if adaptive. Each probe averages over +ε and −ε, so that the slope cancels:
    for small σ the mean is σ²/2 · Tr(T ∇²L T). Costs two losses a probe, and one.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays, n numbers in all.
      data: a batch or an iterable of batches.
      sigma: σ > 0, the standard deviation of each parameter's noise, so that ‖δ‖ is about σ√n; relative to
        \|w\| if adaptive.
      key: a JAX random key.
      num_probes: how many draws of ε, at least 2; with ``relative_standard_error`` the most that are made.
      relative_standard_error: stop once standard error/\|mean\| is at most this; looked at from the tenth on.
      adaptive: scale by \|w\|.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each probe.

    Returns:
      An :class:`AverageSharpness`.

    Raises:
      TypeError, ValueError: as :func:`gradient_norm`, or for a bad number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: jnp.sum(w) + 0.5 * jnp.sum(w**2)
      >>> result = curvature.average_sharpness(loss_fn, jnp.zeros(1000), sigma=0.1, key=jax.random.key(0))
      >>> abs(result.mean - 5.0) < 4 * result.standard_error  # σ²/2 · 1000
      True

    References:
      Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and Generalization", ICML 2023, eq. 1.
    """
    check_number("sigma", sigma)
    if sigma == 0:
        raise ValueError("sigma must be positive.")
    check_whole_number("num_probes", num_probes, at_least=2)
    if relative_standard_error is not None:
        check_number("relative_standard_error", relative_standard_error)
    params = widened_params(params)
    scale = _scale(params, adaptive)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)

    center = loss.value(params)
    rises: list[float] = []
    for probe_key in jax.random.split(key, num_probes):
        noise = _scaled(scale, optax.tree.random_like(probe_key, params))
        pair = [loss.value(shifted(params, optax.tree.scale(sign * sigma, noise))) for sign in (1, -1)]
        rises.append(sum(pair) / 2 - center)
        if progress is not None:
            progress(len(rises), num_probes)
        if is_precise(rises, relative_standard_error):
            break
    result: Estimate = estimate(rises)
    return AverageSharpness(*result, loss=center)


def _scale(params: Any, adaptive: bool) -> Any:
    """The diagonal of T; None for the identity."""
    return jax.tree.map(jnp.abs, params) if adaptive else None


def _scaled(scale: Any, tree: Any) -> Any:
    return tree if scale is None else jax.tree.map(jnp.multiply, scale, tree)
