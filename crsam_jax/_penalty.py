"""What the penalties along v and along random directions share: weights of the logarithms, the bound, the numbers."""

import jax
import jax.numpy as jnp
import optax

from crsam_jax._checks import check_hyperparameter
from crsam_jax.engine import PLUS, Outcome, Step, Weights


def log_weight(coefficient: jax.Array, argument: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """coefficient/argument, the derivative of the logarithm, or 0; and whether the guard changed anything."""
    is_usable = argument > noise  # False for NaN too
    weight = jnp.where(is_usable, coefficient / jnp.where(is_usable, argument, 1), 0)
    return weight.astype(coefficient.dtype), ~is_usable & (coefficient != 0)


def with_penalty(
    step: Step, penalty: Weights, is_defined: jax.Array, is_guarded: jax.Array, max_ratio: jax.Array | None
) -> Outcome:
    """g⁺ plus the penalty's gradient, scaled down to at most ``max_ratio`` ‖g⁺‖; g⁺ where it is not finite."""
    is_defined = is_defined & jnp.isfinite(step.norm(penalty))
    bounded, is_bounded = penalty, jnp.bool_(False)
    if max_ratio is not None:
        ratio = step.ratio(penalty, PLUS)
        is_bounded = ratio > max_ratio
        factor = jnp.where(is_bounded, max_ratio / jnp.where(is_bounded, ratio, 1), 1)
        bounded = [factor * weight for weight in penalty]
    weights = [1 + bounded[0], 1 + bounded[1], *bounded[2:]]
    return Outcome(weights, penalty, PLUS, is_defined, is_guarded, is_bounded)


def checked_numbers(
    alpha: optax.ScalarOrSchedule,
    beta: optax.ScalarOrSchedule,
    offset: optax.ScalarOrSchedule,
    max_penalty_ratio: optax.ScalarOrSchedule | None,
) -> dict[str, optax.ScalarOrSchedule]:
    """The penalty's numbers by name, checked; without a bound there is no entry for it."""
    numbers = {"alpha": alpha, "beta": beta, "offset": offset}
    if max_penalty_ratio is not None:
        numbers["max_penalty_ratio"] = max_penalty_ratio
    for name, value in numbers.items():
        check_hyperparameter(name, value)
    return numbers
