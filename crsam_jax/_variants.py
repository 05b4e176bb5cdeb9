"""Variants of SAM with one idea each: another length, another radius, random weights, the network's function alone.

The constructors share their arguments with :func:`crsam_jax.crsam`, which describes them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_hyperparameter, check_number, explains_foreign_arguments, whole_number
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax._one_sided import sam, sharpness
from crsam_jax._parallel import Execution
from crsam_jax._trees import Params
from crsam_jax.ascents import Ascent, GradientFn, Mask, no_state, random_weight_ascent
from crsam_jax.engine import HERE, PLUS, Step, Weights, one_sided, sharpness_aware


def renormalized(step: Step) -> Weights:
    """The gradient (‖g‖/‖g⁺‖) g⁺ (Tan et al., algorithm 1)."""
    length = step.ratio(HERE, PLUS)
    return length, length


@explains_foreign_arguments
def stable_sam(
    loss_fn: LossFn | None = None,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """StableSAM: SAM's gradient with the length of g, (‖g‖/‖g⁺‖) g⁺. Two evaluations.

    Args:
      rho: ρ ≥ 0, a number or schedule.
      loss_fn, ascent, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

    Returns:
      A transformation from g to the rescaled g⁺, same structure and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 3.0]) * w**2)
      >>> tx = crsam_jax.stable_sam(loss_fn, rho=1.0)
      >>> w = jnp.array([3.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(jnp.linalg.norm(gradient) / jnp.linalg.norm(jax.grad(loss_fn)(w)))
      1.0

    References:
      Tan et al., "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy", JMLR 2025,
      arXiv 2401.07250, algorithm 1.
    """
    return sharpness_aware(
        loss_fn, one_sided(renormalized), rho, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution
    )


@explains_foreign_arguments
def le_sam(
    loss_fn: LossFn | None = None,
    sigma: float = 0.05,
    max_rho: float = 1.0,
    *,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LE-SAM: SAM whose radius is ρ = min(σ/‖g‖, ρ_max), a fixed rise of the loss instead of a fixed distance.

    To first order the loss rises by ρ‖g‖ = σ. Two evaluations.

    Args:
      sigma: σ ≥ 0, the rise, in units of the loss.
      max_rho: ρ_max ≥ 0, the largest radius.
      loss_fn, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

    Returns:
      A transformation from g to g⁺, same structure and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 3.0 * w[0] + 4.0 * w[1]  # ‖g‖ = 5
      >>> tx = crsam_jax.le_sam(loss_fn, sigma=0.5)
      >>> w = jnp.zeros(2)
      >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(state.diagnostics.loss_plus)
      0.5

    References:
      LE-SAM, ICML 2026, arXiv 2605.10183.
    """
    check_number("sigma", sigma)
    check_number("max_rho", max_rho)

    def apply(grads: Params, state: Any, params: Params, gradient_fn: GradientFn | None = None) -> tuple[Params, Any]:
        del params, gradient_fn
        length = trees.norm(grads)
        radius = jnp.minimum(sigma / jnp.where(length > 0, length, 1), max_rho)
        return jax.tree.map(lambda v: radius.astype(v.dtype) * v, trees.unit(grads)), state

    return sam(loss_fn, 1.0, ascent=Ascent(no_state, apply), has_aux=has_aux, mask=mask, execution=execution)


@explains_foreign_arguments
def multi_step_sam(
    loss_fn: LossFn | None = None,
    rho: float = 0.05,
    steps: int = 2,
    *,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM with k ascent steps of length ρ/k: wⱼ = wⱼ₋₁ + (ρ/k) ∇L(wⱼ₋₁)/‖∇L(wⱼ₋₁)‖, then ∇L(w_k). k + 1 evaluations.

    Args:
      rho: ρ ≥ 0, the length of the whole path, a number.
      steps: k ≥ 1; k = 1 is :func:`crsam_jax.sam`.
      loss_fn, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

    Returns:
      A transformation from g to the gradient at the end of the path, same structure and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)  # every step goes along w
      >>> tx = crsam_jax.multi_step_sam(loss_fn, rho=1.0, steps=4)
      >>> w = jnp.array([3.0, 4.0])
      >>> print(tx.update(w, tx.init(w), w)[0])
      [3.6 4.8]

    References:
      Foret et al., ICLR 2021, appendix C.3 (multiple inner iterations); ``optax.contrib.sam`` with ``sync_period=k+1``.
    """
    check_number("rho", rho)
    whole_number("steps", steps, at_least=1)

    def apply(grads: Params, state: Any, params: Params, gradient_fn: GradientFn) -> tuple[Params, Any]:
        path = jax.tree.map(jnp.zeros_like, trees.widen(params))
        for step in range(steps):
            if step:
                point = trees.wide_map(lambda w, v: w + jnp.asarray(rho, v.dtype) * v, params, path)
                grads = gradient_fn(trees.cast_like(point, params))
            path = jax.tree.map(lambda v, u: v + u / steps, path, trees.unit(grads))
        return path, state

    return sam(loss_fn, rho, ascent=Ascent(no_state, apply), has_aux=has_aux, mask=mask, execution=execution)


def mixed(step: Step, weight: jax.Array) -> Weights:
    """The gradient λ g + (1−λ) g⁺ = g + (1−λ) d (Li et al.)."""
    del step
    return 1.0, 1 - weight


@explains_foreign_arguments
def rwp(
    loss_fn: LossFn | None = None,
    sigma: float = 0.01,
    weight: optax.ScalarOrSchedule = 0.5,
    seed: int = 0,
    *,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Mixed random weight perturbation: λ g + (1−λ) ∇L(w + Δ) with Gaussian noise Δ. Two evaluations.

    Δ is drawn filter by filter, as in :func:`crsam_jax.ascents.smoothed_ascent`, so that E‖Δ‖² = σ²‖w‖². It does not
    depend on g: the two evaluations are independent of each other.

    Args:
      sigma: σ ≥ 0, size of the noise relative to the weights.
      weight: λ in [0, 1], a number or schedule. λ = 0 is plain RWP, λ = 1 the base optimizer.
      seed: an integer; the noise depends on it and on the step alone.
      loss_fn, has_aux, mask, execution: as in :func:`crsam_jax.crsam`.

    Returns:
      A transformation from g to the mixed gradient, same structure and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> w = jnp.ones(10_000)
      >>> tx = crsam_jax.rwp(loss_fn, sigma=0.1, weight=0.0)
      >>> gradient, _ = tx.update(w, tx.init(w), w)
      >>> print(round(float(jnp.linalg.norm(gradient - w) / jnp.linalg.norm(w)), 2))
      0.1

    References:
      Li et al., "Revisiting Random Weight Perturbation for Efficiently Improving Generalization", TMLR 2024, arXiv
      2404.00357, and arXiv 2211.11489 for the noise drawn filter by filter.
    """
    check_hyperparameter("weight", weight)
    ascent = random_weight_ascent(sigma, seed)
    rule = one_sided(mixed, weight=weight)
    return sharpness_aware(loss_fn, rule, 1.0, ascent=ascent, has_aux=has_aux, mask=mask, execution=execution)


@explains_foreign_arguments
def functional_sam(
    network_fn: Callable[..., Any],
    criterion_fn: Callable[..., jax.Array],
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    ascent: Ascent | None = None,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Functional-SAM: SAM that perturbs the network's function and not the loss's derivative by its outputs.

    For :math:`L(w) = \ell(f(w))` the gradient is :math:`J_f(w + \rho v)^\top \nabla\ell(f(w))`, where SAM has
    :math:`\nabla\ell(f(w + \rho v))`. It is the gradient at w + ρv of
    :math:`L(w) + \langle f(\cdot) - f(w), \nabla\ell(f(w)) \rangle`, which ``loss_plus`` reports. Two evaluations: f(w)
    and the criterion's derivative are parts of the caller's own pass, with which the compiler merges them.

    Args:
      network_fn: ``network_fn(params, **kwargs) -> outputs``, a tree of arrays (logits).
      criterion_fn: ``criterion_fn(outputs, **kwargs) -> loss``, a scalar. Pass in the gradient of
        ``criterion_fn(network_fn(params, ...), ...)``. Both take their arguments by name from ``update``.
      rho: ρ ≥ 0, a number or schedule.
      ascent: the rule for v; the paper pairs it with :func:`crsam_jax.ascents.preconditioned_ascent` too.
      mask, execution: as in :func:`crsam_jax.crsam`. ``Execution(axis_name=...)`` averages as for every method.

    Returns:
      A transformation from g to the functional gradient, same structure and dtypes.

    Raises:
      TypeError: if one of the functions is not callable; at ``update``, if one lacks an argument.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> network_fn = lambda w, x: jnp.tanh(x @ w)
      >>> criterion_fn = lambda outputs, y: 0.5 * jnp.sum((outputs - y) ** 2)
      >>> tx = crsam_jax.functional_sam(network_fn, criterion_fn, rho=0.1)
      >>> w, x, y = jnp.array([0.5, -0.5]), jnp.eye(2), jnp.ones(2)
      >>> g = jax.grad(lambda w: criterion_fn(network_fn(w, x), y))(w)
      >>> gradient, _ = tx.update(g, tx.init(w), w, x=x, y=y)
      >>> there = w + 0.1 * g / jnp.linalg.norm(g)
      >>> print(jnp.allclose(gradient, (1 - jnp.tanh(there) ** 2) * (jnp.tanh(w) - y)))
      True

    References:
      Singh et al., "Avoiding spurious sharpness minimization broadens applicability of SAM", ICML 2025, arXiv
      2502.02407.
    """
    network, criterion = LossBinder(network_fn, False), LossBinder(criterion_fn, False)

    def loss_fn(params: Params, **kwargs: Any) -> jax.Array:
        return criterion_fn(network_fn(params, **network.arguments(kwargs)), **criterion.arguments(kwargs))

    def perturbed_loss_fn(point: Params, center: Params, **kwargs: Any) -> jax.Array:
        network_kwargs, criterion_kwargs = network.arguments(kwargs), criterion.arguments(kwargs)
        here = network_fn(center, **network_kwargs)
        loss, slope = jax.value_and_grad(lambda out: criterion_fn(out, **criterion_kwargs))(here)
        change = jax.tree.map(lambda a, b: a - b, network_fn(point, **network_kwargs), here)
        return loss + trees.dot(change, slope).astype(loss.dtype)

    return sharpness_aware(
        loss_fn,
        one_sided(sharpness),
        rho,
        ascent=ascent,
        mask=mask,
        execution=execution,
        perturbed_loss_fn=perturbed_loss_fn,
    )
