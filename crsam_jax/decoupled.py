"""WSAM in its decoupled form: the sharpness term bypasses the base optimizer, as decoupled weight decay does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _tree
from crsam_jax._checks import ScalarOrSchedule, check_hyperparameter, value_at
from crsam_jax._loss import LossFn
from crsam_jax.alias import sam
from crsam_jax.ascent import Ascent, Mask
from crsam_jax.probes import synced
from crsam_jax.transform import SharpnessAwareState


class DecoupledWsamState(NamedTuple):
    """State of :func:`decoupled_wsam`: of the ascent step, with its diagnostics, and of the base optimizer."""

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
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, decoupled: the base optimizer is fed g, then w ← w − η γ/(1−γ) (g⁺ − g).

    The sharpness term sees neither momentum nor preconditioning, clipping or weight decay. This is a whole
    optimizer, not a stage before one: it returns updates to add to params. With plain SGD of the same learning rate
    it equals :func:`crsam_jax.wsam` in front of it. Where the probe fails, the sharpness term is left out.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      base_optimizer: any optax optimizer, with its own learning rate.
      learning_rate: η ≥ 0 of the sharpness term, a number or schedule; the base optimizer's own, in the paper.
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    plus = sam(
        loss_fn,
        rho,
        ascent=ascent,
        evaluation=evaluation,
        has_aux=has_aux,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
        mask=mask,
    )
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> DecoupledWsamState:
        return DecoupledWsamState(plus.init(params), base.init(params))

    def update(
        updates: Any, state: DecoupledWsamState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DecoupledWsamState]:
        count, dtype = state.sharpness.count, _tree.wide_dtype(params)
        g_plus, sharpness = plus.update(updates, state.sharpness, params, **extra_args)
        if axis_name is not None and not sync_perturbation:  # g⁺ is averaged now, g not yet
            updates = synced(updates, axis_name)
        base_updates, base_state = base.update(updates, state.base, params, **extra_args)
        share = value_at(gamma, count, dtype)
        weight = value_at(learning_rate, count, dtype) * share / (1 - share)
        is_finite = _tree.all_finite(g_plus)

        def combine(update: jax.Array, g: jax.Array, g_plus: jax.Array) -> jax.Array:
            return update - jnp.where(is_finite, weight * (g_plus - g), 0)

        combined = _tree.wide_map(combine, base_updates, updates, g_plus)
        return _tree.cast_like(combined, base_updates), DecoupledWsamState(sharpness, base_state)

    return optax.GradientTransformationExtraArgs(init, update)
