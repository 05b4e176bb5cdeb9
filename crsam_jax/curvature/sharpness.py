"""How much the loss rises nearby: at worst, by gradient ascent, and on average, under Gaussian noise."""

from typing import Any

import jax

from crsam_jax._loss import LossFn
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import Progress
from crsam_jax.curvature.objective import Objective
from crsam_jax.curvature.results import AverageSharpness, WorstCaseSharpness


def worst_case_sharpness(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    rho: float,
    num_steps: int = 20,
    step_size: float | None = None,
    adaptive: bool = False,
    key: jax.Array | None = None,
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
      key: a JAX random key. Where the gradient at w is exactly zero, the ascent starts in a random direction.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each gradient or loss, that is each pass over data.

    Returns:
      A :class:`WorstCaseSharpness`; its value is NaN if a loss or gradient on the path is NaN.

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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.worst_case_sharpness(
        rho=rho,
        num_steps=num_steps,
        step_size=step_size,
        adaptive=adaptive,
        key=key,
        progress=progress,
    )


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
    for small σ the mean is σ²/2 · Tr(T ∇²L T). Costs two losses per probe, and one.

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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.average_sharpness(
        sigma=sigma,
        key=key,
        num_probes=num_probes,
        relative_standard_error=relative_standard_error,
        adaptive=adaptive,
        progress=progress,
    )
