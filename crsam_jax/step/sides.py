"""Rules with one probe, with two opposite ones, and with probes at chosen multiples of ρv."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.checks import check_number
from crsam_jax.step.diagnostics import AscentOnlyDiagnostics, OneSidedDiagnostics, TwoSidedDiagnostics
from crsam_jax.step.evaluation import perturb
from crsam_jax.step.mismatch import is_one_sided_mismatch, is_two_sided_mismatch
from crsam_jax.step.rule import Basis, Outcome, Rule, Seen, Step
from crsam_jax.step.types import Evaluation, Params, ScalarOrSchedule
from crsam_jax.step.vectors import Vector


class Differences(NamedTuple):
    """The differences S and D, and for each the size below which it is rounding noise; scalars."""

    second: jax.Array
    first: jax.Array
    second_noise: jax.Array
    first_noise: jax.Array


def one_sided(combine: Callable[..., Vector | Outcome], **numbers: ScalarOrSchedule) -> Rule:
    """A rule made of g and g⁺ alone.

    Args:
      combine: ``(step, **numbers) -> Vector``, the method's formula.
      **numbers: its numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`crsam_jax.sharpness_aware`, which reports :class:`crsam_jax.OneSidedDiagnostics`.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> def halfway(step):
      ...   return (step.here.grad + step.plus.grad) / 2
      >>> tx = crsam_jax.sharpness_aware(lambda w: jnp.sum(w**2), crsam_jax.one_sided(halfway), rho=0.1)
    """
    return Rule(combine, _one_sided_report, OneSidedDiagnostics, numbers)


def ascent_only(combine: Callable[..., Vector | Outcome], **numbers: ScalarOrSchedule) -> Rule:
    """A rule made of g⁺ alone: g gives the direction v and nothing else."""
    return Rule(combine, _ascent_only_report, AscentOnlyDiagnostics, numbers, reads_gradient=False)


def two_sided(combine: Callable[..., Vector | Outcome], **numbers: ScalarOrSchedule) -> Rule:
    """A rule made of g, g⁺ and g⁻; the step has ``minus`` beside ``here`` and ``plus``.

    Args:
      combine: ``(step, **numbers) -> Vector``, the method's formula.
      **numbers: its numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`crsam_jax.sharpness_aware`, which reports :class:`crsam_jax.TwoSidedDiagnostics`.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> def second_order(step, alpha):
      ...   return step.plus.grad + alpha * (step.plus.grad + step.minus.grad - 2 * step.here.grad)
      >>> rule = crsam_jax.two_sided(second_order, alpha=0.5)
      >>> tx = crsam_jax.sharpness_aware(lambda w: jnp.sum(w**2), rule, rho=0.1)
    """
    return two_sided_rule(combine, loss_differences, numbers)


def at_multiples(
    combine: Callable[..., Vector | Outcome], multiples: Sequence[float], **numbers: ScalarOrSchedule
) -> Rule:
    """A rule made of the gradients at w, at w + ρv, and at w + mρv for each of some multiples m.

    Args:
      combine: ``(step, **numbers) -> Vector``, the method's formula; ``step.further`` lists the multiples' points.
      multiples: m of each further point, numbers.
      **numbers: the formula's numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`crsam_jax.sharpness_aware`, which reports :class:`crsam_jax.OneSidedDiagnostics`.

    Example:
      The mean over four points along v:

      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> def mean(step):
      ...   return sum((at.grad for at in step.further), step.plus.grad) / 4
      >>> rule = crsam_jax.at_multiples(mean, [-1, 2, -2])
      >>> loss_fn = lambda w: jnp.sum(w**3) / 3
      >>> tx = crsam_jax.sharpness_aware(loss_fn, rule, rho=1.0)
      >>> w = jnp.array([2.0, 0.0])  # v = [1, 0]
      >>> print(tx.update(jax.grad(loss_fn)(w), tx.init(w), w)[0])  # the mean of 3², 1², 4² and 0²
      [6.5 0. ]
    """
    for multiple in multiples:
        check_number("abs(multiple)", abs(multiple))

    def points(params: Params, direction: Params, rho: jax.Array, count: jax.Array) -> list[Params]:
        del count
        return [perturb(params, direction, multiple * rho) for multiple in multiples]

    return Rule(combine, _one_sided_report, OneSidedDiagnostics, numbers, points)


def two_sided_rule(
    combine: Callable[..., Vector | Outcome],
    measure: Callable[[Step], Differences],
    numbers: dict[str, ScalarOrSchedule],
) -> Rule:
    """The rule of :func:`two_sided`, with the way in which S and D of the diagnostics are measured."""

    def report(step: Step, outcome: Outcome, seen: Seen) -> TwoSidedDiagnostics:
        found = measure(step)
        curvature = measured(step, found.second / step.reach**2)
        return TwoSidedDiagnostics(
            loss=seen.loss,
            loss_plus=seen.loss_plus,
            loss_minus=step.minus.loss,
            grad_norm=seen.grad_norm,
            cosine=seen.cosine,
            slope=measured(step, found.first / (2 * step.reach)),
            curvature=curvature,
            normalized_curvature=trees.safe_ratio(curvature, seen.grad_norm),
            penalty_ratio=penalty_ratio(step, outcome),
            guarded_steps=seen.is_guarded,
            bounded_steps=seen.is_bounded,
            mismatched_steps=is_two_sided_mismatch(step),
        )

    return Rule(combine, report, TwoSidedDiagnostics, numbers, _mirrored_point, _mirrored_basis)


def loss_differences(step: Step) -> Differences:
    """S = L⁺ + L⁻ − 2L and D = L⁺ − L⁻."""
    here, plus, minus = step.here.loss, step.plus.loss, step.minus.loss
    noise = step.loss_noise(plus, 2 * here, minus)
    return Differences(second_difference(here, plus, minus), plus - minus, noise, noise)


def second_difference(loss: jax.Array, loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """S = L⁺ + L⁻ − 2L, grouped so that nearly equal numbers are subtracted first."""
    return (loss_plus - loss) + (loss_minus - loss)


def measured(step: Step, value: jax.Array) -> jax.Array:
    """A measure along v; 0 where nothing was perturbed."""
    return jnp.where(step.is_perturbed, value, 0)


def penalty_ratio(step: Step, outcome: Outcome) -> jax.Array:
    """‖penalty's gradient‖/‖g⁺‖ before the bound; 0 where there is none."""
    if outcome.penalty is None:
        return jnp.zeros(())
    is_there = step.is_perturbed & outcome.is_defined
    return jnp.where(is_there, step.products.ratio(outcome.penalty, step.plus.grad), 0)


def _one_sided_report(step: Step, outcome: Outcome, seen: Seen) -> OneSidedDiagnostics:
    del outcome
    return OneSidedDiagnostics(
        loss=seen.loss,
        loss_plus=seen.loss_plus,
        grad_norm=seen.grad_norm,
        cosine=seen.cosine,
        curvature=step.curvature,
        guarded_steps=seen.is_guarded,
        mismatched_steps=is_one_sided_mismatch(step),
    )


def _ascent_only_report(step: Step, outcome: Outcome, seen: Seen) -> AscentOnlyDiagnostics:
    del outcome
    length = jnp.where(step.is_perturbed, step.products.direction_norm, 1)
    return AscentOnlyDiagnostics(
        loss_plus=seen.loss_plus,
        grad_norm=seen.grad_norm,
        slope=measured(step, step.products.along(step.plus.grad) / length),
        guarded_steps=seen.is_guarded,
    )


def _mirrored_point(params: Params, direction: Params, rho: jax.Array, count: jax.Array) -> list[Params]:
    del count
    return [perturb(params, direction, -rho)]


def _mirrored_basis(here: Evaluation, plus: Evaluation, further: Sequence[Evaluation]) -> Basis:
    """g⁺ + g⁻ − 2g as an element of its own: it is small beside the differences that it is made of."""
    del here, plus, further
    second = lambda g, plus, minus: [(plus - g) + (minus - g)]
    return Basis(second, [Vector((1.0, -1.0, 1.0))])  # g⁻ = g − (g⁺ − g) + (g⁺ + g⁻ − 2g)
