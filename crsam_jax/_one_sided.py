"""SAM and the methods made of g and g⁺: each a formula, as weights of (g, d = g⁺ − g), and a constructor.

The constructors share their arguments with :func:`crsam_jax.crsam`, which describes them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_hyperparameter, explains_foreign_arguments
from crsam_jax._loss import LossFn
from crsam_jax._parallel import Execution, checked_execution, synced
from crsam_jax.ascents import Ascent, Mask, adaptive_ascent, smoothed_ascent
from crsam_jax.engine import (
    HERE,
    PLUS,
    Outcome,
    SharpnessAwareState,
    Step,
    Weights,
    are_valid,
    of_gradients,
    one_sided,
    sharpness_aware,
    value_at,
)
from crsam_jax.engine import (
    ascent_only as only_for_ascent,
)

__all__ = ["DecoupledWsamState", "asam", "decoupled_wsam", "gradient_norm_penalty", "gsam", "rsam", "sam", "wsam"]


def sharpness(step: Step) -> Weights:
    """The gradient g⁺ = ∇L(w + ρv) (Foret et al., eq. 3)."""
    del step
    return PLUS


@explains_foreign_arguments
def sam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    ascent: Ascent | None = None,
    ascent_only: bool = False,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM: the gradient at the point of steepest ascent, g⁺ = ∇L(w + ρ g/‖g‖).

    Args:
      rho: ρ ≥ 0, distance of the ascent step, a number or schedule.
      ascent_only: whether the gradient passed in gives the direction and nothing else. It may then be taken on a
        part of the batch, at 1 + b′/b evaluations per step; L(w) is not needed, and the state holds
        :class:`crsam_jax.diagnostics.AscentOnlyDiagnostics`.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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
    rule = only_for_ascent(sharpness) if ascent_only else one_sided(sharpness)
    return sharpness_aware(loss_fn, rule, rho, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution)


@explains_foreign_arguments
def asam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.5,
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
      rho: ρ ≥ 0, in units of the weights' own size, a number or schedule.
      eta: η ≥ 0, a number.
      adaptive: which leaves are scaled, see :func:`crsam_jax.ascents.adaptive_ascent`.
      ascent_only: see :func:`sam`.
      loss_fn, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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


@explains_foreign_arguments
def rsam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.05,
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
      rho: ρ ≥ 0, a number or schedule.
      sigma: σ ≥ 0, size of the noise Δ relative to the weights. σ = 0 is SAM. :func:`crsam_jax.ascents.smoothed_ascent`
        says what of the paper could be verified.
      weight: λ > 0, weight of the gradient against the noise.
      seed: an integer; the noise depends on it and on the step alone.
      ascent_only: see :func:`sam`.
      loss_fn, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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


def weighted_sharpness(step: Step, gamma: jax.Array) -> Outcome:
    """(1−a) g + a g⁺ with a = γ/(1−γ) (Yue et al., KDD 2023); g where γ ≥ 1, which a schedule may reach."""
    del step
    a = gamma / (1 - gamma)
    return Outcome((1.0, a), is_defined=gamma < 1)


@explains_foreign_arguments
def wsam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: optax.ScalarOrSchedule = 0.9,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, coupled: (1−a) g + a g⁺ with a = γ/(1−γ), the gradient of L + a (L_SAM − L).

    γ = 1/2 is SAM, γ = 0 the base optimizer; from γ > 1/2 on the weight of g is negative.

    Args:
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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


@explains_foreign_arguments
def decoupled_wsam(
    loss_fn: LossFn | None,
    base_optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: optax.ScalarOrSchedule = 0.9,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """WSAM, decoupled: the base optimizer is fed g, then w ← w − η γ/(1−γ) (g⁺ − g).

    The sharpness term sees neither momentum nor preconditioning, clipping or weight decay. This is a whole
    optimizer, not a stage before one: it returns updates to add to params. With plain SGD of the same learning rate
    it equals :func:`crsam_jax.wsam` in front of it. Where g⁺ is not finite, a schedule leaves its range (γ reaches 1,
    η is negative), or the sum overflows, the sharpness term is left out and the step counted in ``guarded_steps``.

    Args:
      base_optimizer: any optax optimizer, with its own learning rate.
      learning_rate: η ≥ 0 of the sharpness term, a number or schedule; the base optimizer's own, in the paper.
      rho: ρ ≥ 0, a number or schedule.
      gamma: 0 ≤ γ < 1, a number or schedule.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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
        count, dtype = state.sharpness.step_count, trees.wide_dtype(params)
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
    steps = before.diagnostics.guarded_steps + is_left_out.astype(jnp.int32)
    steps = jnp.maximum(now.diagnostics.guarded_steps, steps)
    return now._replace(diagnostics=now.diagnostics._replace(guarded_steps=steps))


def surrogate_gap(step: Step, alpha: jax.Array) -> Weights:
    """The gradient g⁺ − α (g − p g⁺) with p = ⟨g, g⁺⟩/‖g⁺‖² (Zhuang et al., algorithm 1)."""
    p = step.projection(HERE, onto=PLUS)
    return of_gradients(here=-alpha, plus=1 + alpha * p)


@explains_foreign_arguments
def gsam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.4,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²), which also closes the surrogate gap L⁺ − L.

    The paper ties ρ to the learning rate; pass a schedule for that.

    Args:
      rho: ρ ≥ 0, a number or schedule.
      alpha: α ≥ 0, weight of the part of g orthogonal to g⁺, a number or schedule.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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


def gradient_norm(step: Step, alpha: jax.Array) -> Weights:
    """The gradient (1−α) g + α g⁺ = g + α d (Zhao et al., algorithm 1)."""
    del step
    return 1.0, alpha


@explains_foreign_arguments
def gradient_norm_penalty(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.8,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradient-norm penalty: (1−α) g + α g⁺ ≈ the gradient of L + λ‖∇L‖ with λ = αρ.

    α = 1 is SAM, α = 0 the base optimizer. The same direction as :func:`wsam` with α = γ/(1−γ).

    Args:
      rho: ρ ≥ 0 (the paper's r), a number or schedule.
      alpha: α ≥ 0, a number or schedule.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

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
