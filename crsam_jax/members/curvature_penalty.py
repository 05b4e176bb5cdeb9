"""CR-SAM's rule: from S and D along v to the gradient of L⁺ + α log(δ+S) + β log(δ+D), eq. 7 of the paper.

By theorem 1 S = L⁺ + L⁻ − 2L ≈ ρ² vᵀHv and D = L⁺ − L⁻ ≈ 2ρ vᵀ∇L.
"""

from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from crsam_jax.step.checks import check_choice, check_hyperparameter
from crsam_jax.step.rule import NOISE_ULPS, Outcome, Rule, Step
from crsam_jax.step.sides import Differences, loss_differences, two_sided_rule
from crsam_jax.step.types import ScalarOrSchedule
from crsam_jax.step.vectors import Vector

Form: TypeAlias = Literal["log", "linear"]
Measure: TypeAlias = Literal["losses", "gradients"]


def curvature_penalty(
    form: Form,
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
    differences: Measure,
) -> Rule:
    """g⁺ + a (g⁺+g⁻−2g) + b (g⁺−g⁻) with a = α/(δ+S) and b = β/(δ+D), or a = α and b = β in the linear form.

    A logarithm whose argument is not positive, or is rounding noise, is left out.
    """
    check_choice("penalty", form, get_args(Form))
    check_choice("differences", differences, get_args(Measure))
    measure = loss_differences if differences == "losses" else gradient_differences

    def combine(
        step: Step,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_penalty_ratio: jax.Array | None = None,
    ) -> Outcome:
        here, plus, minus = step.here, step.plus, step.minus
        if form == "log":
            found = measure(step)
            a, a_is_off = log_weight(alpha, offset + found.second, found.second_noise)
            b, b_is_off = log_weight(beta, offset + found.first, found.first_noise)
        else:
            a, b, a_is_off, b_is_off = alpha, beta, jnp.bool_(False), jnp.bool_(False)
        penalty = a * (plus.grad + minus.grad - 2 * here.grad) + b * (plus.grad - minus.grad)
        return with_penalty(step, penalty, jnp.isfinite(minus.loss), a_is_off | b_is_off, max_penalty_ratio)

    return two_sided_rule(combine, measure, checked_numbers(alpha, beta, offset, max_penalty_ratio))


def gradient_differences(step: Step) -> Differences:
    """S ≈ (ρ/2)⟨v, g⁺ − g⁻⟩ and D ≈ ρ⟨v, g⁺ + g⁻⟩, by the trapezoid rule along v, in error O(ρ⁴) and O(ρ³).

    They need no losses, and so survive a loss that is rounded to half precision.
    """
    plus, minus = step.plus.grad, step.minus.grad
    second = step.rho / 2 * step.products.along(plus - minus)
    first = step.rho * step.products.along(plus + minus)
    noise = jnp.finfo(first.dtype).eps * NOISE_ULPS * abs(first)
    return Differences(second, first, noise, noise)


def log_weight(coefficient: jax.Array, argument: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """coefficient/argument, the derivative of the logarithm, or 0; and whether the guard changed anything."""
    is_usable = argument > noise  # False for NaN too
    weight = jnp.where(is_usable, coefficient / jnp.where(is_usable, argument, 1), 0)
    return weight.astype(coefficient.dtype), ~is_usable & (coefficient != 0)


def with_penalty(
    step: Step, penalty: Vector, is_defined: jax.Array, is_guarded: jax.Array, max_ratio: jax.Array | None
) -> Outcome:
    """g⁺ plus the penalty's gradient, scaled down to at most ``max_ratio`` ‖g⁺‖; g⁺ where it is not finite."""
    plus = step.plus.grad
    is_defined = is_defined & jnp.isfinite(step.products.norm(penalty))
    bounded, is_bounded = penalty, jnp.bool_(False)
    if max_ratio is not None:
        ratio = step.products.ratio(penalty, plus)
        is_bounded = ratio > max_ratio
        bounded = jnp.where(is_bounded, max_ratio / jnp.where(is_bounded, ratio, 1), 1) * penalty
    return Outcome(plus + bounded, penalty, plus, is_defined, is_guarded, is_bounded)


def checked_numbers(
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
) -> dict[str, ScalarOrSchedule]:
    """The penalty's numbers by name, checked; without a bound there is no entry for it."""
    numbers = {"alpha": alpha, "beta": beta, "offset": offset}
    if max_penalty_ratio is not None:
        numbers["max_penalty_ratio"] = max_penalty_ratio
    for name, value in numbers.items():
        check_hyperparameter(name, value)
    return numbers
