"""What to make of it: from the gradients g, g⁺, g⁻ and the losses L, L⁺, L⁻ to one gradient.

Pure tree arithmetic, in at least float32. One-sided rules see g at w and g⁺ at w + ρv; two-sided ones also g⁻
at w − ρv. With S = L⁺ + L⁻ − 2L and D = L⁺ − L⁻, S/ρ² ≈ vᵀHv and D/2ρ ≈ vᵀg (theorem 1 of the CR-SAM paper).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax import _tree
from crsam_jax._checks import ScalarOrSchedule, check_choice, check_hyperparameter
from crsam_jax.probes import Evaluation

PENALTIES = ("log", "linear")

# The losses carry an error of this many units in the last place each, at least.
_NOISE_ULPS = 4


class Penalty(NamedTuple):
    """A rule that combines the evaluations of one step.

    Attributes:
      two_sided: whether it needs the probe at w − ρv.
      hyperparams: its numbers or schedules by name, handed to ``combine`` as float scalars.
      combine: ``(center, plus, **hyperparams) -> gradient`` if one-sided, where ``center`` and ``plus`` are
        gradients at w and w + ρv; ``(center, plus, minus, **hyperparams) -> (gradient, Term)`` if
        two-sided, where they are :class:`Evaluation`. The gradient is in at least float32.
    """

    two_sided: bool
    hyperparams: Mapping[str, ScalarOrSchedule]
    combine: Callable[..., Any]


class Term(NamedTuple):
    """What became of the penalty's own gradient: scalars.

    Attributes:
      ratio: ‖penalty's gradient‖/‖g⁺‖ before the bound.
      guarded: whether a part of it, or all of it, was left out because it is undefined or noise.
      bounded: whether it was scaled down to the bound.
    """

    ratio: jax.Array
    guarded: jax.Array
    bounded: jax.Array


def second_difference(loss: jax.Array, loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """S = L⁺ + L⁻ − 2L ≈ ρ² vᵀHv, grouped so that nearly equal numbers are subtracted first."""
    return (loss_plus - loss) + (loss_minus - loss)


def sharpness() -> Penalty:
    """g⁺: SAM (Foret et al., ICLR 2021, eq. 3)."""
    return Penalty(False, {}, lambda center, plus: _tree.widen(plus))


def gradient_norm(alpha: ScalarOrSchedule) -> Penalty:
    """(1−α) g + α g⁺: descent on L + λ‖∇L‖ with λ = αρ (Zhao et al., ICML 2022, algorithm 1)."""
    check_hyperparameter("alpha", alpha)

    def combine(center: Any, plus: Any, alpha: jax.Array) -> Any:
        return _tree.wide_map(lambda g, g_plus: (1 - alpha) * g + alpha * g_plus, center, plus)

    return Penalty(False, {"alpha": alpha}, combine)


def weighted_sharpness(gamma: ScalarOrSchedule) -> Penalty:
    """(1−a) g + a g⁺ with a = γ/(1−γ): WSAM, coupled (Yue et al., KDD 2023)."""
    check_hyperparameter("gamma", gamma, below=1)

    def combine(center: Any, plus: Any, gamma: jax.Array) -> Any:
        weight = gamma / (1 - gamma)
        return _tree.wide_map(lambda g, g_plus: (1 - weight) * g + weight * g_plus, center, plus)

    return Penalty(False, {"gamma": gamma}, combine)


def surrogate_gap(alpha: ScalarOrSchedule) -> Penalty:
    """g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²): GSAM (Zhuang et al., ICLR 2022, algorithm 1)."""
    check_hyperparameter("alpha", alpha)

    def combine(center: Any, plus: Any, alpha: jax.Array) -> Any:
        unit_plus = _tree.unit(plus)
        along = _tree.dot(center, unit_plus)
        return _tree.wide_map(lambda g, g_plus, u: g_plus - alpha * (g - along * u), center, plus, unit_plus)

    return Penalty(False, {"alpha": alpha}, combine)


def curvature(
    penalty: str,
    alpha: ScalarOrSchedule,
    beta: ScalarOrSchedule,
    offset: ScalarOrSchedule,
    max_penalty_ratio: ScalarOrSchedule | None,
) -> Penalty:
    """g⁺ + α (g⁺+g⁻−2g)/(δ+S) + β (g⁺−g⁻)/(δ+D), or without the denominators: CR-SAM (Wu et al., AAAI 2024).

    The gradient of L(w+ρv) + α log(δ+S) + β log(δ+D), or of L(w+ρv) + αS + βD, with v held constant. A logarithm whose
    argument is not positive, or is below the rounding noise of the losses, is left out.
    """
    check_choice("penalty", penalty, PENALTIES)
    hyperparams = {"alpha": alpha, "beta": beta, "offset": offset}
    if max_penalty_ratio is not None:
        hyperparams["max_ratio"] = max_penalty_ratio
    for name, value in hyperparams.items():
        check_hyperparameter("max_penalty_ratio" if name == "max_ratio" else name, value)
    weights = _log_weights if penalty == "log" else _linear_weights

    def combine(
        center: Evaluation,
        plus: Evaluation,
        minus: Evaluation,
        alpha: jax.Array,
        beta: jax.Array,
        offset: jax.Array,
        max_ratio: jax.Array | None = None,
    ) -> tuple[Any, Term]:
        second_weight, first_weight, is_partial = weights(center, plus, minus, alpha, beta, offset)
        term = _tree.wide_map(
            lambda g, g_plus, g_minus: (
                second_weight * ((g_plus - g) + (g_minus - g)) + first_weight * (g_plus - g_minus)
            ),
            center.grads, plus.grads, minus.grads,
        )  # fmt: skip
        usable = jnp.isfinite(minus.loss) & _tree.all_finite(minus.grads) & _tree.all_finite(term)
        term = _tree.select(usable, term, jax.tree.map(jnp.zeros_like, term))
        term, ratio, bounded = _bound(term, plus.grads, max_ratio)
        gradient = _tree.wide_map(jnp.add, plus.grads, term)
        return gradient, Term(ratio, guarded=is_partial | ~usable, bounded=bounded)

    return Penalty(True, hyperparams, combine)


def _linear_weights(
    center: Evaluation, plus: Evaluation, minus: Evaluation, alpha: jax.Array, beta: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return alpha, beta, jnp.zeros((), bool)


def _log_weights(
    center: Evaluation, plus: Evaluation, minus: Evaluation, alpha: jax.Array, beta: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    loss, loss_plus, loss_minus = _tree.widen((center.loss, plus.loss, minus.loss))
    noise = _NOISE_ULPS * jnp.finfo(plus.loss.dtype).eps * (abs(loss_plus) + 2 * abs(loss) + abs(loss_minus))

    def weight(coefficient: jax.Array, difference: jax.Array) -> tuple[jax.Array, jax.Array]:
        argument = offset + difference
        usable = argument > noise  # false for NaN too
        safe = jnp.where(usable, coefficient / jnp.where(usable, argument, 1), 0)
        return safe.astype(coefficient.dtype), ~usable & (coefficient != 0)

    second_weight, second_off = weight(alpha, second_difference(loss, loss_plus, loss_minus))
    first_weight, first_off = weight(beta, loss_plus - loss_minus)
    return second_weight, first_weight, second_off | first_off


def _bound(term: Any, plus: Any, max_ratio: jax.Array | None) -> tuple[Any, jax.Array, jax.Array]:
    """The term scaled down to at most ``max_ratio`` ‖g⁺‖, its ratio before that, and whether it was."""
    term_norm, plus_norm = _tree.norm(term), _tree.norm(plus)
    nothing = term_norm == 0
    ratio = jnp.where(nothing, 0, term_norm / jnp.where(nothing, 1, plus_norm))
    if max_ratio is None:
        return term, ratio, jnp.zeros((), bool)
    bounded = ratio > max_ratio
    factor = jnp.where(bounded, max_ratio / jnp.where(bounded, ratio, 1), 1)
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, term), ratio, bounded
