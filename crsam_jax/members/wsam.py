"""WSAM: SAM's sharpness as a weighted term, coupled, and decoupled as weight decay is in AdamW."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.ascents.ascent import Ascent
from crsam_jax.members.sam import sam
from crsam_jax.step import trees
from crsam_jax.step.axes import synced
from crsam_jax.step.checks import check_hyperparameter, value_at
from crsam_jax.step.execution import Execution, checked_execution
from crsam_jax.step.fallbacks import are_valid
from crsam_jax.step.rule import Outcome, Step
from crsam_jax.step.sides import one_sided
from crsam_jax.step.transformation import SharpnessAwareState, sharpness_aware
from crsam_jax.step.types import LossFn, Mask, ScalarOrSchedule


def weighted_sharpness(step: Step, gamma: jax.Array) -> Outcome:
    """(1−a) g + a g⁺ with a = γ/(1−γ) (Yue et al., KDD 2023); g where γ ≥ 1, which a schedule may reach."""
    a = gamma / (1 - gamma)
    return Outcome((1 - a) * step.here.grad + a * step.plus.grad, is_defined=gamma < 1)


def wsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, coupled: (1−a) g + a g⁺ with a = γ/(1−γ), the gradient of L + a (L_SAM − L).

    γ = 1/2 is SAM, γ = 0 the base optimizer; from γ > 1/2 on the weight of g is negative.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to the weighted gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import wsam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = wsam(loss_fn, rho=0.5, gamma=0.75)  # a = 3
      >>> w = jnp.array([0.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # w + 3 · 0.5 w/‖w‖
      [0.  5.5]

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD
      2023, arXiv 2305.15817. The paper's own form is the decoupled one.
    """
    check_hyperparameter("gamma", gamma, below=1)
    return sharpness_aware(
        loss_fn,
        one_sided(weighted_sharpness, gamma=gamma),
        rho,
        ascent=ascent,
        has_aux=has_aux,
        mask=mask,
        execution=execution,
    )


class DecoupledWsamState(NamedTuple):
    """State of :func:`decoupled_wsam`: of its ascent step, with the diagnostics, and of its base optimizer."""

    sharpness: SharpnessAwareState
    base: Any


def decoupled_wsam(
    loss_fn: LossFn,
    base_optimizer: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    rho: ScalarOrSchedule = 0.05,
    gamma: ScalarOrSchedule = 0.9,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, decoupled: the base optimizer is fed g, then w ← w − η γ/(1−γ) (g⁺ − g).

    The sharpness term sees neither momentum nor preconditioning, clipping or weight decay. This is a whole
    optimizer, not a stage before one: it returns updates to add to params. With plain SGD of the same learning rate
    it equals :func:`crsam_jax.wsam` in front of it. Where the probe fails, a schedule leaves its range (γ reaches 1,
    η is negative), or the sum overflows, the sharpness term is left out and the step counted in ``guarded_steps``.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      base_optimizer: any optax optimizer, with its own learning rate.
      learning_rate: η ≥ 0 of the sharpness term, a number or schedule; the base optimizer's own, in the paper.
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to updates, structure and dtypes of g.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.decoupled_wsam(loss_fn, optax.sgd(1.0), learning_rate=0.5, rho=0.5, gamma=0.75)
      >>> w = jnp.array([0.0, 4.0])
      >>> updates, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(updates)  # -w − 0.5 · 3 · 0.5 w/‖w‖
      [-0.   -4.75]

    References:
      Yue et al., "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term", KDD
      2023, arXiv 2305.15817, algorithm 1.
    """
    check_hyperparameter("learning_rate", learning_rate)
    check_hyperparameter("gamma", gamma, below=1)
    plus = sam(loss_fn, rho, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution)
    local_axis = checked_execution(execution).local_axis
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> DecoupledWsamState:
        return DecoupledWsamState(plus.init(params), base.init(params))

    def update(
        updates: Any, state: DecoupledWsamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DecoupledWsamState]:
        count, dtype = state.sharpness.count, trees.wide_dtype(params)
        g_plus, sharpness = plus.update(updates, state.sharpness, params, **extra_args)
        if local_axis is not None:  # g⁺ is averaged now, g not yet
            updates = synced(updates, local_axis)
        base_updates, base_state = base.update(updates, state.base, params, **extra_args)
        share, rate = value_at(gamma, count, dtype), value_at(learning_rate, count, dtype)
        is_valid = are_valid({"learning_rate": rate, "gamma": share}) & (share < 1)
        weight = rate * share / jnp.where(is_valid, 1 - share, 1)

        def combine(update: jax.Array, g: jax.Array, g_plus: jax.Array) -> jax.Array:
            return update - jnp.where(is_valid, weight * (g_plus - g), 0)

        combined = trees.cast_like(trees.wide_map(combine, base_updates, updates, g_plus), base_updates)
        is_whole = is_valid & trees.all_finite(combined)
        result = trees.select(is_whole, combined, base_updates)
        return result, DecoupledWsamState(_counted(sharpness, state.sharpness, ~is_whole), base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _counted(now: SharpnessAwareState, before: SharpnessAwareState, is_left_out: jax.Array) -> SharpnessAwareState:
    """The state with this step counted as guarded, once, if the sharpness term was left out."""
    steps = before.diagnostics.guarded_steps + is_left_out
    steps = jnp.maximum(now.diagnostics.guarded_steps, steps)
    return now._replace(diagnostics=now.diagnostics._replace(guarded_steps=steps))
