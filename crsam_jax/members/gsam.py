"""GSAM: SAM's gradient without the part of g that widens the surrogate gap."""

import jax
import optax

from crsam_jax.ascents.ascent import Ascent
from crsam_jax.step.checks import check_hyperparameter
from crsam_jax.step.execution import Execution
from crsam_jax.step.rule import Step
from crsam_jax.step.sides import one_sided
from crsam_jax.step.transformation import sharpness_aware
from crsam_jax.step.types import LossFn, Mask, ScalarOrSchedule
from crsam_jax.step.vectors import Vector


def surrogate_gap(step: Step, alpha: jax.Array) -> Vector:
    """The gradient g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²) (Zhuang et al., algorithm 1)."""
    g, plus = step.here.grad, step.plus.grad
    return plus - alpha * (g - step.products.projection(g, onto=plus) * plus)


def gsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.4,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²), which also closes the surrogate gap L⁺ − L.

    The paper ties ρ to the learning rate; pass a schedule for that.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, a number or schedule.
      alpha: α ≥ 0, weight of the part of g orthogonal to g⁺, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to the combined gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import gsam
      >>> loss_fn = lambda w: w[0]  # g⁺ = [1, 0] wherever we look
      >>> tx = gsam(loss_fn, alpha=0.5)
      >>> w = jnp.zeros(2)
      >>> gradient, _ = tx.update(jnp.array([1.0, 2.0]), tx.init(w), w)
      >>> print(gradient)
      [ 1. -1.]

    References:
      Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
      arXiv 2203.08065, algorithm 1.
    """
    check_hyperparameter("alpha", alpha)
    return sharpness_aware(
        loss_fn,
        one_sided(surrogate_gap, alpha=alpha),
        rho,
        ascent=ascent,
        has_aux=has_aux,
        mask=mask,
        execution=execution,
    )
