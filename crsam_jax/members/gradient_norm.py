"""The gradient-norm penalty: a mean of g and g⁺."""

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


def gradient_norm(step: Step, alpha: jax.Array) -> Vector:
    """The gradient (1−α) g + α g⁺ (Zhao et al., algorithm 1)."""
    return (1 - alpha) * step.here.grad + alpha * step.plus.grad


def gradient_norm_penalty(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.8,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient-norm penalty: (1−α) g + α g⁺ ≈ the gradient of L + λ‖∇L‖ with λ = αρ.

    α = 1 is SAM, α = 0 the base optimizer. The same direction as :func:`wsam` with α = γ/(1−γ).

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0 (the paper's r), a number or schedule.
      alpha: α ≥ 0, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to the combined gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import gradient_norm_penalty
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = gradient_norm_penalty(loss_fn, rho=0.5, alpha=0.5)
      >>> w = jnp.array([0.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # w + 0.5 · 0.5 w/‖w‖
      [0.   4.25]

    References:
      Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
      ICML 2022, arXiv 2202.03599, algorithm 1.
    """
    check_hyperparameter("alpha", alpha)
    return sharpness_aware(
        loss_fn,
        one_sided(gradient_norm, alpha=alpha),
        rho,
        ascent=ascent,
        has_aux=has_aux,
        mask=mask,
        execution=execution,
    )
