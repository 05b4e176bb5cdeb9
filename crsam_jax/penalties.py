"""What to make of it: from what a step saw at its points to one gradient.

Pure tree arithmetic, in at least float32: g at w, g⁺ at w + ρv, and whatever further points a penalty asks for.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax import _tree
from crsam_jax._checks import ScalarOrSchedule, check_hyperparameter
from crsam_jax.diagnostics import Diagnostics, OneSidedDiagnostics
from crsam_jax.probes import Evaluation


class Step(NamedTuple):
    """What a step saw.

    Attributes:
      loss: L at w, as ``loss_fn`` returned it.
      grads: g, as it came in.
      plus: loss and gradient at w + ρv.
      others: losses and gradients at the penalty's further points.
      direction: v; zeros where nothing is perturbed.
      length: ‖v‖, and 1 where nothing is perturbed, so that it divides safely.
      radius: ρ, and 1 where nothing is perturbed.
      count: int32, steps before this one.
    """

    loss: jax.Array
    grads: Any
    plus: Evaluation
    others: list[Evaluation]
    direction: Any
    length: jax.Array
    radius: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count


class Penalty(NamedTuple):
    """A rule that turns what a step saw into one gradient.

    Attributes:
      hyperparams: its numbers or schedules by name, handed to ``combine`` as float scalars.
      combine: ``(step, **hyperparams) -> (gradient, seen)``: a tree in at least float32, and its own diagnostics by
        name. ``guarded_steps`` and ``bounded_steps`` are booleans for this step alone.
      points: ``(params, direction, radius, count) -> further points``, beside w + ρv.
      diagnostics: the NamedTuple to fill.
    """

    hyperparams: Mapping[str, ScalarOrSchedule]
    combine: Callable[..., tuple[Any, dict[str, Any]]]
    points: Callable[[Any, Any, jax.Array, jax.Array], list[Any]]
    diagnostics: type[Diagnostics]


def one_sided_penalty(combine: Callable[..., Any], **hyperparams: ScalarOrSchedule) -> Penalty:
    """A penalty made of g and g⁺ alone.

    Args:
      combine: ``(g, g_plus, **hyperparams) -> gradient``, trees like params.
      **hyperparams: numbers or schedules; ``combine`` gets them as float scalars.

    Returns:
      A penalty for :func:`crsam_jax.sharpness_aware`.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> def halfway(g, g_plus):
      ...   return jax.tree.map(lambda a, b: (a + b) / 2, g, g_plus)
      >>> tx = crsam_jax.sharpness_aware(jnp.sum, crsam_jax.one_sided_penalty(halfway), rho=0.1)
    """

    def combine_step(step: Step, **values: jax.Array) -> tuple[Any, dict[str, Any]]:
        return combine(step.grads, step.plus.grads, **values), {
            "curvature": one_sided_curvature(step),
            "guarded_steps": False,
        }

    return Penalty(hyperparams, combine_step, lambda *_: [], OneSidedDiagnostics)


def one_sided_curvature(step: Step) -> jax.Array:
    """⟨v, g⁺ − g⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖²."""
    change = _tree.wide_map(jnp.subtract, step.plus.grads, step.grads)  # first, or the difference of dots cancels
    return _tree.dot(step.direction, change) / (step.radius * step.length**2)


def sharpness() -> Penalty:
    """g⁺: SAM (Foret et al., ICLR 2021, eq. 3)."""
    return one_sided_penalty(lambda g, g_plus: _tree.widen(g_plus))


def gradient_norm(alpha: ScalarOrSchedule) -> Penalty:
    """(1−α) g + α g⁺: descent on L + λ‖∇L‖ with λ = αρ (Zhao et al., ICML 2022, algorithm 1)."""
    check_hyperparameter("alpha", alpha)

    def combine(g: Any, g_plus: Any, alpha: jax.Array) -> Any:
        return _tree.wide_map(lambda a, b: (1 - alpha) * a + alpha * b, g, g_plus)

    return one_sided_penalty(combine, alpha=alpha)


def weighted_sharpness(gamma: ScalarOrSchedule) -> Penalty:
    """(1−a) g + a g⁺ with a = γ/(1−γ): WSAM, coupled (Yue et al., KDD 2023)."""
    check_hyperparameter("gamma", gamma, below=1)

    def combine(g: Any, g_plus: Any, gamma: jax.Array) -> Any:
        weight = gamma / (1 - gamma)
        return _tree.wide_map(lambda a, b: (1 - weight) * a + weight * b, g, g_plus)

    return one_sided_penalty(combine, gamma=gamma)


def surrogate_gap(alpha: ScalarOrSchedule) -> Penalty:
    """g⁺ − α (g − ⟨g, g⁺⟩ g⁺/‖g⁺‖²): GSAM (Zhuang et al., ICLR 2022, algorithm 1)."""
    check_hyperparameter("alpha", alpha)

    def combine(g: Any, g_plus: Any, alpha: jax.Array) -> Any:
        unit_plus = _tree.unit(g_plus)
        along = _tree.dot(g, unit_plus)
        return _tree.wide_map(lambda a, b, u: b - alpha * (a - along * u), g, g_plus, unit_plus)

    return one_sided_penalty(combine, alpha=alpha)
