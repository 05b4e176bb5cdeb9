"""SAM and its relatives by another ascent: the gradient at one probe, ASAM's and R-SAM's too."""

import optax

from crsam_jax.ascents.adaptive import adaptive_ascent
from crsam_jax.ascents.ascent import Ascent
from crsam_jax.ascents.noisy import smoothed_ascent
from crsam_jax.step import sides
from crsam_jax.step.execution import Execution
from crsam_jax.step.rule import Step
from crsam_jax.step.transformation import sharpness_aware
from crsam_jax.step.types import LossFn, Mask, ScalarOrSchedule
from crsam_jax.step.vectors import Vector


def sharpness(step: Step) -> Vector:
    """The gradient g⁺ = ∇L(w + ρv) (Foret et al., eq. 3)."""
    return step.plus.grad


def sam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    *,
    ascent: Ascent | None = None,
    ascent_only: bool = False,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM: the gradient at the point of steepest ascent, g⁺ = ∇L(w + ρ g/‖g‖).

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, distance of the ascent step, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      ascent_only: whether the gradient passed in gives the direction and nothing else. It may then be that of a part of
        the batch, at 1 + b′/b evaluations a step; L(w) is not needed, and the state holds
        :class:`crsam_jax.AscentOnlyDiagnostics`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to g⁺, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import sam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = optax.chain(sam(loss_fn, rho=0.5), optax.sgd(1.0))
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(updates)  # -(w + 0.5 w/‖w‖)
      [-3.3 -4.4]

    References:
      Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
      arXiv 2010.01412, eq. 2 and 3.
    """
    if not isinstance(ascent_only, bool):
        raise TypeError(f"ascent_only must be True or False, got {ascent_only!r}.")
    rule = sides.ascent_only(sharpness) if ascent_only else sides.one_sided(sharpness)
    return sharpness_aware(loss_fn, rule, rho, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution)


def asam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    *,
    adaptive: Mask | None = None,
    ascent_only: bool = False,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ASAM: ∇L(w + ρ T² g/‖T g‖) with T = diag(abs(w) + η), invariant to rescaling of the weights.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, in units of the weights' own size, a number or schedule.
      eta: η ≥ 0, a number.
      adaptive: which leaves are scaled, see :func:`crsam_jax.adaptive_ascent`.
      ascent_only: see :func:`sam`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to the gradient at the perturbed point, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import asam
      >>> loss_fn = lambda w: jnp.sum(w)  # g = [1, 1], so e = ρ w²/‖w‖
      >>> tx = asam(loss_fn, rho=5**0.5, eta=0.0)
      >>> w = jnp.array([1.0, 2.0])
      >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(state.diagnostics.loss_plus)  # 3 + (1 + 4)
      8.0

    References:
      Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
      Networks", ICML 2021, arXiv 2102.11600, algorithm 1; ρ = 0.5 and η = 0.01 are its values for CIFAR-10.
    """
    ascent = adaptive_ascent(eta, adaptive)
    return sam(loss_fn, rho, ascent=ascent, ascent_only=ascent_only, has_aux=has_aux, mask=mask, execution=execution)


def rsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    sigma: float = 0.05,
    weight: float = 1.0,
    seed: int = 0,
    *,
    ascent_only: bool = False,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """R-SAM: the ascent direction is taken at a randomly smoothed point, v ∝ Δ + λ ∇L(w+Δ), then ∇L(w + ρv).

    One more evaluation than SAM, three in all.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, a number or schedule.
      sigma: σ ≥ 0, size of the noise Δ relative to the weights, see :func:`crsam_jax.smoothed_ascent`, which also says
        what of the paper could be verified. σ = 0 is SAM.
      weight: λ > 0, weight of the gradient against the noise.
      seed: an integer; the noise depends on it and on the step alone.
      ascent_only: see :func:`sam`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: axes to average over, see :class:`crsam_jax.Execution`.

    Returns:
      A transformation from g to g⁺, same structure and dtypes.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.crsam`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import rsam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = rsam(loss_fn, rho=0.5, sigma=0.1, seed=1)
      >>> w = jnp.array([3.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(jnp.linalg.norm(gradient - w))  # the perturbation's length is ρ
      0.5

    References:
      Liu et al., "Random Sharpness-Aware Minimization", NeurIPS 2022; the baseline of table 2 of the CR-SAM paper.
    """
    ascent = smoothed_ascent(sigma, weight, seed)
    return sam(loss_fn, rho, ascent=ascent, ascent_only=ascent_only, has_aux=has_aux, mask=mask, execution=execution)
