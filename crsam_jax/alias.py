"""The rest of the family, in its papers' names and defaults: an ascent and a penalty each, and nothing else.

Every member takes the keyword options of :func:`crsam_jax.crsam` with the same meaning, fails with the same
errors, and reports :class:`crsam_jax.OneSidedDiagnostics`. A step costs the caller's gradient and one more.
"""

import optax

from crsam_jax import penalties
from crsam_jax._checks import ScalarOrSchedule
from crsam_jax._loss import LossFn
from crsam_jax.ascent import Ascent, Mask, adaptive_ascent
from crsam_jax.noisy_ascent import smoothed_ascent
from crsam_jax.transform import sharpness_aware


def sam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    *,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM: the gradient at the point of steepest ascent, g⁺ = ∇L(w + ρ g/‖g‖).

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, distance of the ascent step, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.sharpness(), rho,
        ascent=ascent, evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def asam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    *,
    adaptive: Mask | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ASAM: ∇L(w + ρ T² g/‖T g‖) with T = diag(|w| + η), invariant to rescaling of the weights.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, in units of the weights' own size, a number or schedule.
      eta: η ≥ 0, a number.
      adaptive: which leaves are scaled, see :func:`crsam_jax.adaptive_ascent`.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.sharpness(), rho,
        ascent=adaptive_ascent(eta, adaptive), evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def rsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    sigma: float = 0.05,
    weight: float = 1.0,
    seed: int = 0,
    *,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
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
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.sharpness(), rho,
        ascent=smoothed_ascent(sigma, weight, seed), evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def wsam(
    loss_fn: LossFn,
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
    """WSAM, coupled: (1−a) g + a g⁺ with a = γ/(1−γ), the gradient of L + a (L_SAM − L).

    γ = 1/2 is SAM, γ = 0 the base optimizer; from γ > 1/2 on the weight of g is negative.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.weighted_sharpness(gamma), rho,
        ascent=ascent, evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def gsam(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.05,
    alpha: ScalarOrSchedule = 0.4,
    *,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²), which also closes the surrogate gap L⁺ − L.

    The paper ties ρ to the learning rate; pass a schedule for that.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0, a number or schedule.
      alpha: α ≥ 0, weight of the part of g orthogonal to g⁺, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.surrogate_gap(alpha), rho,
        ascent=ascent, evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip


def gradient_norm_penalty(
    loss_fn: LossFn,
    rho: ScalarOrSchedule = 0.1,
    alpha: ScalarOrSchedule = 0.8,
    *,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient-norm penalty: (1−α) g + α g⁺ ≈ the gradient of L + λ‖∇L‖ with λ = αρ.

    α = 1 is SAM, α = 0 the base optimizer. The same direction as :func:`wsam` with α = γ/(1−γ).

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, see :func:`crsam_jax.crsam`.
      rho: ρ ≥ 0 (the paper's r), a number or schedule.
      alpha: α ≥ 0, a number or schedule.
      ascent: the rule for the direction; ``None`` is the gradient's.
      evaluation: accepted for uniformity; one probe is evaluated alike in all strategies.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probe is averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

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
    return sharpness_aware(
        loss_fn, penalties.gradient_norm(alpha), rho,
        ascent=ascent, evaluation=evaluation, has_aux=has_aux, axis_name=axis_name,
        sync_perturbation=sync_perturbation, mask=mask,
    )  # fmt: skip
