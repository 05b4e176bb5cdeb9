"""CR-SAM's penalty: from S and D along v to α log(δ+S) + β log(δ+D), or αS + βD, and its gradient.

By theorem 1 of the paper S = L⁺ + L⁻ − 2L ≈ ρ² vᵀHv and D = L⁺ − L⁻ ≈ 2ρ vᵀ∇L.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax import _tree
from crsam_jax._checks import ScalarOrSchedule, check_choice, check_hyperparameter
from crsam_jax.diagnostics import TwoSidedDiagnostics
from crsam_jax.penalties import Penalty, Step
from crsam_jax.probes import perturb

PENALTIES = ("log", "linear")
DIFFERENCES = ("losses", "gradients")

# What is subtracted carries an error of this many units in the last place each, at least.
_NOISE_ULPS = 4


class Differences(NamedTuple):
    """S and D, and the size below which each is rounding noise; scalars."""

    second: jax.Array
    first: jax.Array
    second_noise: jax.Array
    first_noise: jax.Array


def curvature_penalty(
    penalty: str,
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
    differences: str,
) -> Penalty:
    """g⁺ + α (g⁺+g⁻−2g)/(δ+S) + β (g⁺−g⁻)/(δ+D), or without the denominators.

    A logarithm whose argument is not positive, or is rounding noise, is left out.
    """
    check_choice("penalty", penalty, PENALTIES)
    check_choice("differences", differences, DIFFERENCES)
    hyperparams = checked_hyperparameters(alpha, beta, offset, max_penalty_ratio)
    measure = loss_differences if differences == "losses" else gradient_differences

    def combine(
        step: Step,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_penalty_ratio: jax.Array | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        [minus] = step.others
        seen = measure(step)
        if penalty == "log":
            second_weight, second_off = log_weight(alpha, offset + seen.second, seen.second_noise)
            first_weight, first_off = log_weight(beta, offset + seen.first, seen.first_noise)
        else:
            second_weight, first_weight, second_off, first_off = alpha, beta, jnp.bool_(False), jnp.bool_(False)
        term = _tree.wide_map(
            lambda g, g_plus, g_minus: (
                second_weight * ((g_plus - g) + (g_minus - g)) + first_weight * (g_plus - g_minus)
            ),
            step.grads, step.plus.grads, minus.grads,
        )  # fmt: skip
        is_valid = jnp.isfinite(minus.loss) & _tree.all_finite(minus.grads)
        gradient, report = add_term(step.plus.grads, term, is_valid, max_penalty_ratio)
        reach = step.radius * step.length
        curvature, grad_norm = seen.second / reach**2, _tree.norm(step.grads)
        return gradient, {
            "loss_minus": minus.loss,
            "slope": seen.first / (2 * reach),
            "curvature": curvature,
            "normalized_curvature": _tree.safe_ratio(curvature, grad_norm),
            **report,
            "guarded_steps": report["guarded_steps"] | second_off | first_off,
        }

    def points(params: Any, direction: Any, radius: jax.Array, count: jax.Array) -> list[Any]:
        del count
        return [perturb(params, direction, -radius)]

    return Penalty(hyperparams, combine, points, TwoSidedDiagnostics)


def checked_hyperparameters(
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
) -> dict[str, ScalarOrSchedule]:
    """The penalty's numbers by name, checked; no bound, no entry for it."""
    hyperparams = {"alpha": alpha, "beta": beta, "offset": offset}
    if max_penalty_ratio is not None:
        hyperparams["max_penalty_ratio"] = max_penalty_ratio
    for name, value in hyperparams.items():
        check_hyperparameter(name, value)
    return hyperparams


def second_difference(loss: jax.Array, loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """S = L⁺ + L⁻ − 2L, grouped so that nearly equal numbers are subtracted first."""
    return (loss_plus - loss) + (loss_minus - loss)


def loss_differences(step: Step) -> Differences:
    """S = L⁺ + L⁻ − 2L and D = L⁺ − L⁻."""
    [minus] = step.others
    loss, loss_plus, loss_minus = _tree.widen((step.loss, step.plus.loss, minus.loss))
    noise = loss_noise(step.plus.loss.dtype, loss, loss_plus, loss_minus)
    return Differences(second_difference(loss, loss_plus, loss_minus), loss_plus - loss_minus, noise, noise)


def gradient_differences(step: Step) -> Differences:
    """S ≈ (ρ/2)⟨v, g⁺ − g⁻⟩ and D ≈ ρ⟨v, g⁺ + g⁻⟩, by the trapezoid rule along v, in error O(ρ⁴) and O(ρ³).

    They need no losses, and so survive a loss that is rounded to half precision.
    """
    [minus] = step.others
    change = _tree.wide_map(jnp.subtract, step.plus.grads, minus.grads)
    total = _tree.wide_map(jnp.add, step.plus.grads, minus.grads)
    second = step.radius / 2 * _tree.dot(step.direction, change)
    first = step.radius * _tree.dot(step.direction, total)
    noise = jnp.finfo(first.dtype).eps * _NOISE_ULPS * abs(first)
    return Differences(second, first, noise, noise)


def loss_noise(dtype: Any, loss: jax.Array, loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """The rounding error of a difference of losses that have ``dtype``."""
    return _NOISE_ULPS * jnp.finfo(dtype).eps * (abs(loss_plus) + 2 * abs(loss) + abs(loss_minus))


def log_weight(coefficient: jax.Array, argument: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """coefficient/argument, the derivative of the logarithm, or 0; and whether the guard changed anything."""
    is_usable = argument > noise  # false for NaN too
    weight = jnp.where(is_usable, coefficient / jnp.where(is_usable, argument, 1), 0)
    return weight.astype(coefficient.dtype), ~is_usable & (coefficient != 0)


def add_term(
    plus: Any, term: Any, is_valid: jax.Array, max_ratio: jax.Array | None
) -> tuple[Any, dict[str, jax.Array]]:
    """g⁺ plus the penalty's gradient, bounded by ``max_ratio`` ‖g⁺‖ and left out where it is not finite."""
    is_usable = is_valid & _tree.all_finite(term)
    term = _tree.select(is_usable, term, jax.tree.map(jnp.zeros_like, term))
    term_norm, plus_norm = _tree.norm(term), _tree.norm(plus)
    is_zero = term_norm == 0
    ratio = jnp.where(is_zero, 0, term_norm / jnp.where(is_zero, 1, plus_norm))
    is_bounded = jnp.zeros((), bool)
    if max_ratio is not None:
        is_bounded = ratio > max_ratio
        factor = jnp.where(is_bounded, max_ratio / jnp.where(is_bounded, ratio, 1), 1)
        term = jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, term)
    report = {"penalty_ratio": ratio, "guarded_steps": ~is_usable, "bounded_steps": is_bounded}
    return _tree.wide_map(jnp.add, plus, term), report
