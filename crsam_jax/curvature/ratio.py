"""The approximation ratio: how much of the best ascent in the ball one step of ascent reaches."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax import _trees as trees
from crsam_jax._checks import check_choice, check_number
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax.curvature import _vectors
from crsam_jax.curvature._ascend import AscentStep, ascend, ascent_step, check_ascent_arguments, shifted
from crsam_jax.curvature._batches import Data, example_arguments, iterate, leading_axis, num_batches
from crsam_jax.curvature._mean_loss import Progress, widened_params

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

PERTURBATIONS = ("batch", "example")


class ApproximationRatio(NamedTuple):
    """One ascent step against many. With aᵢ = ℓᵢ(w + δ) − ℓᵢ(w) and bᵢ = ℓᵢ(w + δ*) − ℓᵢ(w):

    Attributes:
      mean_of_ratios: the mean of aᵢ/bᵢ over the examples kept, the paper's eq. 2; NaN if none is.
      standard_error: the standard error of ``mean_of_ratios``.
      ratio_of_means: Σ aᵢ/Σ bᵢ over all examples: the ratio of the rises of the mean loss.
      ratio_of_means_standard_error: the standard error of ``ratio_of_means``, by the delta method.
      num_examples: how many examples there are.
      num_excluded: how many were left out of ``mean_of_ratios`` for a bᵢ near zero.
      one_step: aᵢ, [num_examples], float64.
      multi_step: bᵢ, [num_examples], float64.
    """

    mean_of_ratios: float
    standard_error: float
    ratio_of_means: float
    ratio_of_means_standard_error: float
    num_examples: int
    num_excluded: int
    one_step: Array
    multi_step: Array


def approximation_ratio(
    example_losses_fn: LossFn,
    params: Any,
    data: Data,
    *,
    rho: float,
    num_steps: int = 20,
    step_size: float | None = None,
    perturbation: str = "batch",
    threshold: float = 0.01,
    progress: Progress | None = None,
) -> ApproximationRatio:
    r"""The approximation ratio :math:`\mathbb{E}_i [\ell_i(w+\delta) - \ell_i(w)] / [\ell_i(w+\delta^*) - \ell_i(w)]`.

    δ = ρ g/‖g‖ is SAM's one step, and δ* the end of ``num_steps`` steps of length ``step_size``, each along the unit
    gradient at the point reached, followed by the projection onto ‖δ*‖ ≤ ρ. With the default step size ρ/num_steps
    the projection has nothing to do. Near 1, one step is as good as many.

    A single example whose loss hardly changes has a ratio of any size. So the mean of ratios leaves out the
    examples with \|bᵢ\| ≤ ``threshold`` · mean \|b\| and counts them; the ratio of means needs no such rule.

    Each batch costs ``num_steps`` gradients and 3 losses; with a perturbation for each example the same number, each
    of them batched over params.

    Args:
      example_losses_fn: ``example_losses_fn(params, **batch) -> losses`` of shape [examples], the loss of each
        example. The loss of the batch is their mean.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches. With ``perturbation="batch"`` the result depends on how the examples are
        cut into batches: take the batch size that SAM trains with.
      rho: ρ > 0, the radius, in the unit of params.
      num_steps: the number of steps of the long ascent, at least 1; the paper's is 20.
      step_size: > 0. None: ρ/num_steps.
      perturbation: ``"batch"``: δ and δ* are those of the batch's mean loss, as SAM uses them; ``"example"``: every
        example has its own, and must not depend on the others; memory for several copies of params an example, so use
        small batches. Examples are cut from the argument ``batch`` if there is one, else from all; :class:`Batches`
        knows its own.
      threshold: ≥ 0, the part of mean \|b\| at or below which an example has no ratio; at 0 only bᵢ = 0 has none.
      progress: called as ``progress(done, total)`` after each batch; ``total`` is None if ``data`` has no length.

    Returns:
      An :class:`ApproximationRatio`. Its errors take the examples as independent.

    Raises:
      TypeError: if ``example_losses_fn`` or ``data`` has the wrong form, or params is traced.
      ValueError: if ``data`` is empty, or for a bad number or name.

    Example:
      For a loss that is linear in w one step is all there is to gain:

      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> data = {"batch": jnp.array([[3.0, 0.0], [1.0, 4.0]])}
      >>> result = curvature.approximation_ratio(lambda w, batch: batch @ w, jnp.zeros(2), data, rho=0.1)
      >>> round(result.mean_of_ratios, 4), result.num_excluded
      (1.0, 0)

    References:
      Wu et al., "CR-SAM", AAAI 2024, eq. 2. The paper leaves open whose δ it is.
    """
    num_steps = check_ascent_arguments(rho, num_steps, step_size)
    check_choice("perturbation", perturbation, PERTURBATIONS)
    check_number("threshold", threshold)
    LossBinder(example_losses_fn, has_aux=False)
    params = widened_params(params)
    total = num_batches(data)

    rises: list[tuple[Array, Array]] = []
    for batch in iterate(data):
        names = example_arguments(data, batch) if perturbation == "example" else None
        problem = _inner_problem(example_losses_fn, params, dict(batch), names)
        one = problem.step(problem.start, problem.gradient_at(problem.start), rho, rho)
        many = ascend(problem.gradient_at, problem.start, rho, num_steps, step_size, problem.step)
        here, there, far = (np.asarray(problem.losses_at(x), np.float64) for x in (problem.start, one, many))
        rises.append((there - here, far - here))
        if progress is not None:
            progress(len(rises), total)
    one_step, multi_step = (np.concatenate(parts) for parts in zip(*rises, strict=True))
    return _ratio(one_step, multi_step, threshold)


def _ratio(one_step: Array, multi_step: Array, threshold: float) -> ApproximationRatio:
    size = np.abs(multi_step)
    kept = (size > threshold * size.mean()) & (size > 0)
    ratios = one_step[kept] / multi_step[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        of_means = one_step.mean() / multi_step.mean()
        deviations = (one_step - of_means * multi_step) / multi_step.mean()
    return ApproximationRatio(
        mean_of_ratios=float(ratios.mean()) if ratios.size else math.nan,
        standard_error=_standard_error(ratios),
        ratio_of_means=float(of_means),
        ratio_of_means_standard_error=_standard_error(deviations),
        num_examples=one_step.size,
        num_excluded=int(np.sum(~kept)),
        one_step=one_step,
        multi_step=multi_step,
    )


def _standard_error(samples: Array) -> float:
    """The standard error of the mean; NaN for fewer than two samples."""
    return float(samples.std(ddof=1) / math.sqrt(samples.size)) if samples.size > 1 else math.nan


class _InnerProblem(NamedTuple):
    """What the ascent needs to know of one batch; ``start`` is an offset of zero."""

    start: Any
    losses_at: Callable[[Any], jax.Array]
    gradient_at: Callable[[Any], Any]
    step: AscentStep


def _inner_problem(
    example_losses_fn: LossFn, params: Any, batch: dict[str, Any], names: tuple[str, ...] | None
) -> _InnerProblem:
    """One offset for the batch, or, if ``names`` says which arguments hold them, one for each example."""
    start = jax.tree.map(jnp.zeros_like, params)
    if names is None:
        losses_at = functools.partial(_losses, params, batch, example_losses_fn=example_losses_fn)
        gradient_at = functools.partial(_gradient, params, batch, example_losses_fn=example_losses_fn)
        return _InnerProblem(start, losses_at, gradient_at, ascent_step)
    # Each example is batched over: it cannot be divided over the mesh while the offsets are not.
    examples = {name: jax.tree.map(_vectors.replicated, batch.pop(name)) for name in names}
    size = leading_axis(examples)
    start = jax.tree.map(lambda zero: jnp.broadcast_to(zero, (size, *zero.shape)), start)
    own = functools.partial(_own, params, batch, examples, example_losses_fn=example_losses_fn)
    losses_at = functools.partial(own, kernel=_losses)
    gradient_at = functools.partial(own, kernel=_gradient)
    return _InnerProblem(start, lambda offsets: losses_at(offsets)[:, 0], gradient_at, _step_of_each)


@functools.partial(jax.jit, static_argnames="example_losses_fn")
def _losses(params: Any, batch: dict[str, Any], offset: Any, *, example_losses_fn: LossFn) -> jax.Array:
    """The loss of each example at w + δ, ℓᵢ(w + δ), [examples]."""
    kwargs = LossBinder(example_losses_fn, has_aux=False, call="data=dict({})").arguments(batch)
    losses = jnp.asarray(example_losses_fn(shifted(params, offset), **kwargs))
    if losses.ndim != 1 or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            "example_losses_fn must return the loss of each example, real and floating of shape [examples], but it "
            f"returned shape {losses.shape} and dtype {losses.dtype}; do not average over the examples."
        )
    return trees.widen(losses)


@functools.partial(jax.jit, static_argnames="example_losses_fn")
def _gradient(params: Any, batch: dict[str, Any], offset: Any, *, example_losses_fn: LossFn) -> Any:
    """∇ of the batch's mean loss at w + δ."""
    return jax.grad(lambda u: jnp.mean(_losses(params, batch, u, example_losses_fn=example_losses_fn)))(offset)


@functools.partial(jax.jit, static_argnames=("example_losses_fn", "kernel"))
def _own(
    params: Any,
    fixed: dict[str, Any],
    examples: dict[str, Any],
    offsets: Any,
    *,
    example_losses_fn: LossFn,
    kernel: Callable[..., Any],
) -> Any:
    """The kernel on each example alone, as a batch of one, with its own offset."""

    def on_one(example: dict[str, Any], offset: Any) -> Any:
        batch = {**fixed, **jax.tree.map(lambda leaf: leaf[None], example)}
        return kernel(params, batch, offset, example_losses_fn=example_losses_fn)

    return jax.vmap(on_one)(examples, offsets)


_step_of_each = jax.vmap(ascent_step, in_axes=(0, 0, None, None))
