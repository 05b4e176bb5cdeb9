r"""One step of a sharpness-aware method, and the parts from which methods are built.

A step reads as algorithm 1 of the CR-SAM paper:

    direction v → points w ± ρv → losses and gradients there → inner products → rule → fallbacks → gradient

The rule is the method. It sees scalars (losses, inner products, its own numbers) and returns weights of the gradient
and its differences,

.. math::

  g, \qquad d = g^+ - g, \qquad s = g^+ + g^- - 2g,

so that one pass over the parameters makes the result. Nothing cancels where weights add up to zero:
SAM is :math:`(1, 1)`, CR-SAM with its linear penalty :math:`(1, 1 + 2\beta, \alpha - \beta)`.

What a step returns where something is not defined:

=====================================================  ==================  =======
what is found                                          what is returned    counted
=====================================================  ==================  =======
ρ = 0                                                  g                   no
g is not finite, zero, or gives no direction           g                   yes
ρ or a number of the rule is negative or not finite    g                   yes
L⁺ or g⁺ is not finite                                 g                   yes
the penalty is not defined (L⁻ or g⁻ is not finite)    SAM's gradient      yes
the method's gradient overflows the params' dtype      SAM's, else g       yes
one of the penalty's terms is not defined              the rest (by rule)  yes
=====================================================  ==================  =======

A step is counted once. Guards select, they never blend: a NaN in what is not selected does no harm.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_hyperparameter, check_number
from crsam_jax._loss import LossBinder, LossFn, checked_loss
from crsam_jax._parallel import (
    Displacement,
    Evaluation,
    Execution,
    Loss,
    checked_execution,
    evaluate,
    gradient_at,
    loss_at,
    synced,
    varying,
)
from crsam_jax._trees import Params, check_gradient, check_leaves, check_params
from crsam_jax.ascents import GRADIENT_ASCENT, Ascent, Mask, checked_ascent, masked_ascent
from crsam_jax.diagnostics import AscentOnlyDiagnostics, Diagnostics, OneSidedDiagnostics, TwoSidedDiagnostics

__all__ = [
    "HERE",
    "MINUS",
    "PLUS",
    "Displacement",
    "Outcome",
    "Rule",
    "SharpnessAwareState",
    "Step",
    "Weights",
    "at_multiples",
    "of_gradients",
    "one_sided",
    "sharpness_aware",
    "two_sided",
]

Scalar: TypeAlias = float | jax.Array

Weights: TypeAlias = Sequence[Scalar]
"""Weights of g, d = g⁺ − g and, in a two-sided rule, s = g⁺ + g⁻ − 2g. Trailing zeros may be left out."""

HERE: Weights = (1.0,)
"""The weights of g."""

PLUS: Weights = (1.0, 1.0)
"""The weights of g⁺ = g + d."""

MINUS: Weights = (1.0, -1.0, 1.0)
"""The weights of g⁻ = g − d + s."""

# Each loss in a difference may be wrong by this many units in the last place.
NOISE_ULPS = 4


def of_gradients(here: Scalar = 0.0, plus: Scalar = 0.0, minus: Scalar = 0.0) -> Weights:
    """The weights of a combination of the gradients themselves: here · g + plus · g⁺ + minus · g⁻.

    Example:
      >>> from crsam_jax.engine import of_gradients
      >>> of_gradients(here=-0.5, plus=1.0)  # −½ g + g⁺ = ½ g + d
      (0.5, 1.0, 0.0)
    """
    return here + plus + minus, plus - minus, minus


class Step(NamedTuple):
    """What a rule may read: scalars. Weights stand for the gradients in its methods.

    Attributes:
      loss: L(w), in at least float32, like all losses here.
      loss_plus: L⁺ = L(w + ρv).
      further_losses: losses at the rule's other points.
      rho: ρ; 1 where nothing is perturbed, so that it divides safely.
      reach: ρ‖v‖, the distance from w to w + ρv; 1 where nothing is perturbed.
      grad_norm: ‖g‖.
      gram: inner products of (g, d, s), in units of ‖g‖².
      along: ⟨v, x⟩ of the same vectors, in units of ‖g‖.
      loss_epsilon: relative rounding error of a loss, in the narrowest dtype that one came in.
      is_perturbed: whether there is a perturbation.
      params: w, for its shapes and dtypes.
    """

    loss: jax.Array
    loss_plus: jax.Array
    further_losses: Sequence[jax.Array]
    rho: jax.Array
    reach: jax.Array
    grad_norm: jax.Array
    gram: Sequence[Sequence[jax.Array]]
    along: Sequence[jax.Array]
    loss_epsilon: float
    is_perturbed: jax.Array
    params: Params

    @property
    def loss_minus(self) -> jax.Array:
        """L⁻ = L(w − ρv).

        Raises:
          TypeError: if the rule has no such point.
        """
        if not self.further_losses:
            raise TypeError("This rule has no point w − ρv, so there is no loss_minus: build it with two_sided(...).")
        return self.further_losses[0]

    def dot(self, a: Weights, b: Weights) -> jax.Array:
        """⟨a, b⟩ in units of ‖g‖²."""
        return _weighted_sum(a, [_weighted_sum(b, row) for row in self.gram])

    def norm(self, a: Weights) -> jax.Array:
        """‖a‖ in units of ‖g‖."""
        return trees.safe_sqrt(self.dot(a, a))

    def ratio(self, a: Weights, b: Weights) -> jax.Array:
        """‖a‖/‖b‖; 0 where a is zero."""
        above, below = self.norm(a), self.norm(b)
        return jnp.where(above == 0, 0, above / jnp.where(above == 0, 1, below))

    def projection(self, a: Weights, onto: Weights) -> jax.Array:
        """⟨a, onto⟩/‖onto‖²; 0 where ``onto`` is zero."""
        return trees.safe_ratio(self.dot(a, onto), self.dot(onto, onto))

    def cosine(self, a: Weights, b: Weights) -> jax.Array:
        """⟨a, b⟩/(‖a‖‖b‖); 0 where either is zero or not finite."""
        lengths = self.norm(a) * self.norm(b)
        return trees.safe_ratio(self.dot(a, b), jnp.where(jnp.isfinite(lengths), lengths, 0))

    def slope(self, a: Weights) -> jax.Array:
        """⟨v, a⟩, in units of the loss per unit of length."""
        return self.grad_norm * _weighted_sum(a, self.along)

    def loss_noise(self, *losses: jax.Array) -> jax.Array:
        """The rounding error of a sum of the losses."""
        return NOISE_ULPS * self.loss_epsilon * sum(map(abs, losses), jnp.zeros(()))

    def measured(self, value: jax.Array) -> jax.Array:
        """A measure along v; 0 where nothing was perturbed."""
        return jnp.where(self.is_perturbed, value, 0)


class Outcome(NamedTuple):
    """What a rule returns that may be undefined somewhere; plain weights stand for ``Outcome(weights)``.

    Attributes:
      weights: the method's gradient.
      penalty: the part of it that ``penalty_ratio`` reports, before any bound; None if there is none.
      instead: what is returned where the penalty is not defined. Where that is not finite either, the step returns g.
      is_defined: whether the penalty is defined.
      is_guarded: whether the rule itself left out part of the penalty.
      is_bounded: whether the penalty was scaled down.
    """

    weights: Weights
    penalty: Weights | None = None
    instead: Weights = HERE
    is_defined: jax.Array | bool = True
    is_guarded: jax.Array | bool = False
    is_bounded: jax.Array | bool = False


Points: TypeAlias = Callable[[Params, Displacement, jax.Array], Sequence[Displacement]]
Basis: TypeAlias = Callable[..., Sequence[jax.Array]]


def no_points(params: Params, plus: Displacement, count: jax.Array) -> Sequence[Displacement]:
    """No point beside w + ρv."""
    del params, plus, count
    return ()


def differences(losses: Sequence[jax.Array], g: jax.Array, plus: jax.Array, *further: jax.Array) -> list[jax.Array]:
    """The differences g, g⁺ − g, and gᵢ − g for each further point."""
    del losses
    return [g, plus - g, *(at - g for at in further)]


class Rule(NamedTuple):
    """A method: the points it looks at, and what it makes of them. Built by :func:`one_sided` and its like.

    Attributes:
      combine: ``(step, **numbers) -> Weights | Outcome``, the method's formula.
      report: ``(step, outcome) -> dict``, the measures of this method that every step does not report anyway.
      diagnostics: the NamedTuple that holds them.
      numbers: the formula's numbers or schedules by name; ``combine`` gets them as float scalars.
      points: ``(params, plus, count) -> displacements``, the points beside w + ρv, which is ``plus``.
      basis: ``(losses, g, g_plus, *further) -> arrays``, elementwise: what the weights belong to.
      reads_gradient: whether the formula or the report reads g or L(w). ``False``: g gives v only, so it may be the
        gradient of a part of the batch; L(w) is not evaluated.
    """

    combine: Callable[..., Weights | Outcome]
    report: Callable[[Step, Outcome], dict[str, jax.Array]]
    diagnostics: type[Any]
    numbers: Mapping[str, optax.ScalarOrSchedule]
    points: Points = no_points
    basis: Basis = differences
    reads_gradient: bool = True


def one_sided(combine: Callable[..., Weights | Outcome], **numbers: optax.ScalarOrSchedule) -> Rule:
    """A rule made of g and g⁺ alone.

    Args:
      combine: ``(step, **numbers) -> Weights``, the method's formula; it gets a :class:`Step`.
      **numbers: its numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`sharpness_aware`, which reports :class:`crsam_jax.diagnostics.OneSidedDiagnostics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax.engine import of_gradients, one_sided, sharpness_aware
      >>> def halfway(step):
      ...   return of_gradients(here=0.5, plus=0.5)
      >>> tx = sharpness_aware(lambda w: jnp.sum(w**2), one_sided(halfway), rho=0.1)
    """
    return Rule(combine, one_sided_report, OneSidedDiagnostics, numbers)


def ascent_only(combine: Callable[..., Weights | Outcome], **numbers: optax.ScalarOrSchedule) -> Rule:
    """A rule made of g⁺ alone: g gives the direction v and nothing else."""
    return Rule(combine, _ascent_only_report, AscentOnlyDiagnostics, numbers, reads_gradient=False)


def two_sided(combine: Callable[..., Weights | Outcome], **numbers: optax.ScalarOrSchedule) -> Rule:
    """A rule made of g, g⁺ and g⁻; the step has ``loss_minus`` too.

    Args:
      combine: ``(step, **numbers) -> Weights``, the method's formula; it gets a :class:`Step`.
      **numbers: its numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`sharpness_aware`, which reports :class:`crsam_jax.diagnostics.TwoSidedDiagnostics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax.engine import sharpness_aware, two_sided
      >>> def second_order(step, alpha):
      ...   return 1.0, 1.0, alpha  # g⁺ + α (g⁺ + g⁻ − 2g)
      >>> tx = sharpness_aware(lambda w: jnp.sum(w**2), two_sided(second_order, alpha=0.5), rho=0.1)
    """
    return two_sided_rule(combine, loss_differences, numbers)


def at_multiples(
    combine: Callable[..., Weights], multiples: Sequence[float], **numbers: optax.ScalarOrSchedule
) -> Rule:
    """A rule made of the gradients at w, at w + ρv, and at w + mρv for each of some multiples m.

    Args:
      combine: ``(step, **numbers) -> weights`` of the gradients themselves: g, g⁺, and one for each multiple.
      multiples: m of each further point, numbers.
      **numbers: the formula's numbers or schedules, at least 0; ``combine`` gets them as float scalars.

    Returns:
      A rule for :func:`sharpness_aware`, which reports :class:`crsam_jax.diagnostics.OneSidedDiagnostics`.

    Example:
      The mean over four points along v:

      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax.engine import at_multiples, sharpness_aware
      >>> def mean(step):
      ...   return 0.0, 0.25, 0.25, 0.25, 0.25
      >>> loss_fn = lambda w: jnp.sum(w**3) / 3
      >>> tx = sharpness_aware(loss_fn, at_multiples(mean, [-1, 2, -2]), rho=1.0)
      >>> w = jnp.array([2.0, 0.0])  # v = [1, 0]
      >>> print(tx.update(jax.grad(loss_fn)(w), tx.init(w), w)[0])  # the mean of 3², 1², 4² and 0²
      [6.5 0. ]
    """
    for multiple in multiples:
        check_number("abs(multiple)", abs(multiple))

    def points(params: Params, plus: Displacement, count: jax.Array) -> list[Displacement]:
        del params, count
        return [_times(multiple, plus) for multiple in multiples]

    def of_differences(step: Step, **numbers: jax.Array) -> Weights:
        on_here, *others = _checked_weights(combine(step, **numbers), len(multiples) + 2)
        return sum(others, on_here), *others

    return Rule(of_differences, one_sided_report, OneSidedDiagnostics, numbers, points)


class Differences(NamedTuple):
    """The differences S and D, and for each the size below which it is rounding noise; scalars."""

    second: jax.Array
    first: jax.Array
    second_noise: jax.Array
    first_noise: jax.Array


def two_sided_rule(
    combine: Callable[..., Weights | Outcome],
    measure: Callable[[Step], Differences],
    numbers: Mapping[str, optax.ScalarOrSchedule],
) -> Rule:
    """The rule of :func:`two_sided`, with the way in which S and D of the diagnostics are measured."""

    def report(step: Step, outcome: Outcome) -> dict[str, jax.Array]:
        found = measure(step)
        curvature = step.measured(found.second / step.reach**2)
        return {
            "loss_minus": step.loss_minus,
            "slope": step.measured(found.first / (2 * step.reach)),
            "curvature": curvature,
            "normalized_curvature": trees.safe_ratio(curvature, step.grad_norm),
            "penalty_ratio": penalty_ratio(step, outcome),
            "mismatched_steps": _is_two_sided_mismatch(step),
        }

    return Rule(combine, report, TwoSidedDiagnostics, numbers, _mirrored_point, _mirrored_basis)


def loss_differences(step: Step) -> Differences:
    """S = L⁺ + L⁻ − 2L and D = L⁺ − L⁻."""
    here, plus, minus = step.loss, step.loss_plus, step.loss_minus
    noise = step.loss_noise(plus, 2 * here, minus)
    return Differences(second_difference(here, plus, minus), plus - minus, noise, noise)


def second_difference(loss: jax.Array, loss_plus: jax.Array, loss_minus: jax.Array) -> jax.Array:
    """S = L⁺ + L⁻ − 2L, grouped so that nearly equal numbers are subtracted first."""
    return (loss_plus - loss) + (loss_minus - loss)


def _mirrored_point(params: Params, plus: Displacement, count: jax.Array) -> list[Displacement]:
    del params, count
    return [_times(-1, plus)]


def _mirrored_basis(losses: Any, g: jax.Array, plus: jax.Array, minus: jax.Array) -> list[jax.Array]:
    """g, d and s; s is formed on its own, since it is small beside the differences that it is made of."""
    del losses
    return [g, plus - g, (plus - g) + (minus - g)]


def _times(multiple: float, plus: Displacement) -> Displacement:
    *factors, last = plus.factors
    return Displacement(plus.direction, (*factors, multiple * last))


def penalty_ratio(step: Step, outcome: Outcome) -> jax.Array:
    """‖penalty's gradient‖/‖g⁺‖ before the bound; 0 where there is none."""
    if outcome.penalty is None:
        return jnp.zeros(())
    return jnp.where(step.is_perturbed & outcome.is_defined, step.ratio(outcome.penalty, PLUS), 0)


def one_sided_report(step: Step, outcome: Outcome) -> dict[str, jax.Array]:
    """The curvature ⟨v, d⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖², and whether g and L fit what was seen at w + ρv."""
    del outcome
    return {
        "curvature": step.measured(step.slope((0.0, 1.0)) * step.rho / step.reach**2),
        "mismatched_steps": _is_one_sided_mismatch(step),
    }


def _ascent_only_report(step: Step, outcome: Outcome) -> dict[str, jax.Array]:
    del outcome
    return {"slope": step.measured(step.slope(PLUS) * step.rho / step.reach)}


# Mismatch: whether the gradient and the losses of a step can belong to one function.
#
# Let φ(t) = L(w + tρv). A step knows φ(0), φ(±1) and the derivatives a₀ = ρ⟨v, g⟩ and a± = ρ⟨v, g±⟩, all in units of
# the loss. Each is known twice: the points alone predict the incoming g and L.
#
# Two-sided, the gradient. With d = (φ(1) − φ(−1))/2 and m = (a₊ + a₋)/2, by Taylor
#   d = φ′ + φ‴/6 + φ⁽⁵⁾/120 + …,   m = φ′ + φ‴/2 + φ⁽⁵⁾/24 + …,
# so (3d − m)/2 = φ′ − φ⁽⁵⁾/120 − … is a₀ but for the fifth derivative (Simpson's rule, solved for the middle), and
# |m − d| = |φ‴|/3 says how far from straight the loss is. The gradient is mismatched if a₀ misses the prediction by
# more than a quarter of the larger of the two, plus |m − d|, plus the rounding noise of the losses.
#
# Two-sided, the loss. (φ(1) + φ(−1))/2 − (a₊ − a₋)/4 = φ(0) − φ⁽⁴⁾/24 − … does not involve g. The loss is mismatched if
# L misses it by more than a quarter of the larger of |a±|. Of a quartic |a±| = |φ⁽⁴⁾|/6, whose quarter is the term left
# out.
#
# One-sided. By the trapezoid rule 2(φ(1) − φ(0)) − a₊ = φ′ − φ‴/6 − … is a₀ but for the third derivative, which one
# side cannot measure: mismatched if it is missed by more than a quarter of the larger, plus a quarter of
# |a₊ − a₀| ≈ |φ″|, plus the noise. A wrong L and a wrong g look alike here.
#
# A quarter is wide: a step that is flagged is far off. Where ρ is so large that the loss has several turns between the
# points, nothing there says anything about g. From two sides that shows: g⁺ and g⁻ have little to do with each other,
# and the step is not judged. From one side it looks like a gradient that is too large. And where g⁺ and g⁻ both vanish
# while g does not, the loss does not depend on the params that it is given.

SHARE = 0.25
"""By how much a number may miss its prediction, relative to the larger of the two."""

ALIKE = 0.5
"""The least cosine between g⁺ and g⁻ at which the points count as neighbours."""

VANISHED = 1e-3
"""The share of ‖g‖ below which both g⁺ and g⁻ count as vanished."""


def _is_one_sided_mismatch(step: Step) -> jax.Array:
    """Whether g or L does not belong to the function seen at w + ρv."""
    a, a_plus = step.rho * step.slope(HERE), step.rho * step.slope(PLUS)
    bend = SHARE * jnp.abs(a_plus - a)
    noise = step.loss_noise(2 * step.loss_plus, 2 * step.loss)
    return _is_judged(step) & _misses(a, 2 * (step.loss_plus - step.loss) - a_plus, bend + noise)


def _is_two_sided_mismatch(step: Step) -> jax.Array:
    """Whether g or L does not belong to the function seen at w + ρv and w − ρv."""
    here, plus, minus = step.loss, step.loss_plus, step.loss_minus
    a, a_plus, a_minus = (step.rho * step.slope(weights) for weights in (HERE, PLUS, MINUS))
    noise = step.loss_noise(plus, here, minus)
    difference, mean = (plus - minus) / 2, (a_plus + a_minus) / 2
    is_gradient = _misses(a, (3 * difference - mean) / 2, jnp.abs(mean - difference) + noise)
    predicted = (plus + minus) / 2 - (a_plus - a_minus) / 4
    largest = jnp.maximum(jnp.abs(a_plus), jnp.abs(a_minus))
    is_loss = jnp.abs(here - predicted) > SHARE * largest + noise
    is_near = step.cosine(PLUS, MINUS) > ALIKE
    has_vanished = jnp.maximum(step.norm(PLUS), step.norm(MINUS)) < VANISHED
    return _is_judged(step) & (has_vanished | is_near & (is_gradient | is_loss))


def _misses(found: jax.Array, predicted: jax.Array, tolerance: jax.Array) -> jax.Array:
    """Comparisons with inf and NaN are False."""
    largest = jnp.maximum(jnp.abs(found), jnp.abs(predicted))
    return jnp.abs(found - predicted) > SHARE * largest + tolerance


def _is_judged(step: Step) -> jax.Array:
    """In half precision most of ρv is lost where it is added to w, so that w + ρv is not where it should be."""
    return step.is_perturbed & all(jnp.finfo(jnp.result_type(leaf)).bits >= 32 for leaf in jax.tree.leaves(step.params))


# One step


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      step_count: int32, steps so far; schedules read it. Not named ``count``, so that ``optax.tree.get(opt_state,
        "count")`` still finds the optimizer's own.
      ascent: the state of the ascent.
      diagnostics: what the latest step saw; ``optax.tree.get(opt_state, "curvature")`` reads one. Zeros at first.
    """

    step_count: jax.Array
    ascent: Any
    diagnostics: Diagnostics


@dataclasses.dataclass(frozen=True)
class Method:
    """A rule, where it looks (ρ and the ascent), and how it is carried out."""

    rule: Rule
    rho: optax.ScalarOrSchedule
    ascent: Ascent
    execution: Execution

    @classmethod
    def of(
        cls,
        rule: Rule,
        rho: optax.ScalarOrSchedule,
        ascent: Ascent | None,
        mask: Mask | None,
        execution: Execution | None,
    ) -> "Method":
        """A method from its parts, checked and with the defaults filled in."""
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be built by one_sided(...), two_sided(...) or at_multiples(...), got {rule!r}.")
        check_hyperparameter("rho", rho)
        ascent = checked_ascent(ascent)
        return cls(rule, rho, ascent if mask is None else masked_ascent(ascent, mask), checked_execution(execution))

    def init(self, params: Params) -> SharpnessAwareState:
        """The state before the first step."""
        check_leaves(params)
        return SharpnessAwareState(
            step_count=jnp.zeros((), jnp.int32),
            ascent=self.ascent.init(params),
            diagnostics=initial(self.rule.diagnostics, params),
        )

    def gradient(
        self,
        loss: Loss,
        grads: Params,
        state: SharpnessAwareState,
        params: Params,
        loss_here: Any = None,
        perturbed_loss: Loss | None = None,
    ) -> tuple[Params, SharpnessAwareState]:
        """The method's gradient and the state after the step.

        Args:
          loss: the loss as a function of params alone.
          grads: g, its gradient at params.
          state: the state before the step.
          params: w.
          loss_here: L(w) if the caller has it.
          perturbed_loss: the loss at the perturbed points, if it is another one.
        """
        check_params(params)
        check_gradient(grads, params)
        axis = self.execution.local_axis
        here = varying(params, axis)
        direction, memory = self._direction(loss, grads, state.ascent, here, self.execution)
        if self.rule.reads_gradient:
            loss_here = loss_at(loss, here, loss_here, self.execution.averaging_axis)
        else:  # nobody reads it
            loss_here = jnp.zeros((), trees.wide_dtype(params))
        seen_loss = loss if perturbed_loss is None else perturbed_loss
        gradient, seen = self._step(seen_loss, Evaluation(loss_here, grads), state.step_count, here, direction)
        if axis is not None:
            # All parts of the batch keep one memory: the one that a step with the averaged gradient leaves.
            averaging = dataclasses.replace(self.execution, sync_perturbation=True)
            _, memory = self._direction(loss, synced(grads, axis), state.ascent, params, averaging)
            gradient, seen = synced((gradient, seen), axis)
        return gradient, SharpnessAwareState(
            step_count=optax.safe_increment(state.step_count),
            ascent=memory,
            diagnostics=accumulated(state.diagnostics, seen),
        )

    def _direction(
        self, loss: Loss, grads: Params, memory: Any, params: Params, execution: Execution
    ) -> tuple[Params | None, Any]:
        """The direction v and the ascent's new state; None for v = g/‖g‖, which needs no extra tree or products."""
        if self.ascent == GRADIENT_ASCENT:
            return None, memory
        return self.ascent.apply(grads, memory, params, lambda point: gradient_at(loss, point, execution))

    def _step(
        self, loss: Loss, at_params: Evaluation, count: jax.Array, params: Params, direction: Params | None
    ) -> tuple[Params, Diagnostics]:
        loss_here, grads = at_params
        rule, dtype = self.rule, trees.wide_dtype(params)
        rho = value_at(self.rho, count, dtype)
        numbers = {name: value_at(value, count, dtype) for name, value in rule.numbers.items()}
        length = trees.scaled_norm(grads)
        is_usable = length.is_usable & are_valid({"rho": rho, **numbers})

        radius = jnp.where(is_usable, rho, 0)
        scale, factor = trees.unit_factors(length)  # v = g · scale · factor
        if direction is None:
            plus = Displacement(grads, (scale, factor * radius))
        else:
            plus = Displacement(direction, (radius,))
        points = [plus, *rule.points(params, plus, count)]
        evaluations = evaluate(loss, params, points, self.execution)

        losses = [trees.widen(at.loss) for at in (at_params, *evaluations)]
        gradients = [grads, *(at.grads for at in evaluations)]
        basis = lambda *leaves: rule.basis(losses, *leaves)
        gram, along, v_norm = _inner_products(basis, gradients, (scale, factor), direction)
        is_usable = is_usable & (v_norm > 0) & jnp.isfinite(v_norm)
        is_perturbed = is_usable & (rho != 0)
        step = Step(
            loss=losses[0],
            loss_plus=losses[1],
            further_losses=losses[2:],
            rho=jnp.where(is_perturbed, rho, 1),
            reach=jnp.where(is_perturbed, rho * v_norm, 1),
            grad_norm=length.value,
            gram=gram,
            along=along,
            loss_epsilon=max(float(jnp.finfo(value.dtype).eps) for value in (loss_here, evaluations[0].loss)),
            is_perturbed=is_perturbed,
            params=params,
        )
        outcome = _checked_outcome(rule.combine(step, **numbers), len(gram))
        weights, is_guarded, is_bounded = _settled(step, outcome, _largest_of(grads))
        gradient = _combined(weights, basis, gradients)
        gradient, has_overflown = _checked_cast(gradient, grads)
        here = _padded(HERE, len(gram))
        weights = [jnp.where(has_overflown, on_g, weight) for on_g, weight in zip(here, weights, strict=True)]
        seen = {
            "loss": loss_here,
            "loss_plus": evaluations[0].loss,
            "grad_norm": length.value,
            "cosine": step.cosine(here, weights),
            "guarded_steps": ~is_usable | is_guarded | has_overflown,
            "bounded_steps": is_bounded & ~has_overflown,
            **rule.report(step, outcome),
        }
        return gradient, rule.diagnostics(**{name: seen[name] for name in rule.diagnostics._fields})


def _inner_products(
    basis: Basis, gradients: Sequence[Params], units: Sequence[jax.Array], direction: Params | None
) -> tuple[list[list[jax.Array]], list[jax.Array], jax.Array]:
    """⟨bᵢ, bⱼ⟩/‖g‖², ⟨v, bᵢ⟩/‖g‖ and ‖v‖ for the vectors b of the basis, in one pass over the leaves.

    ``units`` are factors whose product is 1/‖g‖.

    In units of ‖g‖ float32 has the range that is needed: g⁺ may be 10¹⁸ times g.
    """
    size = 0

    def terms(*leaves: jax.Array) -> list[jax.Array]:
        nonlocal size
        rows = list(basis(*leaves[: len(gradients)]))
        for unit in units:
            rows = [row * unit for row in rows]
        size = len(rows)
        pairs = [a * b for a, b in itertools.combinations_with_replacement(rows, 2)]
        return [*pairs, *(v * x for v in leaves[len(gradients) :] for x in [*rows, v])]

    found = iter(trees.sums(terms, *gradients, *([] if direction is None else [direction])))
    table = {pair: next(found) for pair in itertools.combinations_with_replacement(range(size), 2)}
    gram = [[table[min(i, j), max(i, j)] for j in range(size)] for i in range(size)]
    if direction is None:
        return gram, gram[0], jnp.ones((), gram[0][0].dtype)
    *along, square = found
    return gram, along, trees.safe_sqrt(square)


def _settled(step: Step, outcome: Outcome, largest: float) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The weights to use after the table of fallbacks, whether the step is guarded, and whether it is bounded."""
    size = len(step.gram)
    lengths = [trees.safe_sqrt(row[i]) for i, row in enumerate(step.gram)]

    def fits(weights: Weights) -> jax.Array:
        """Whether an upper bound on the elements and partial sums is in range; False for NaN, with weight 0 too."""
        bound = jnp.zeros((), lengths[0].dtype)
        for weight, length in zip(weights, lengths, strict=False):
            if isinstance(weight, jax.Array) or weight:
                bound = bound + jnp.abs(jnp.asarray(weight)) * length
        return step.grad_norm * bound <= largest

    is_plus_finite = jnp.isfinite(step.loss_plus) & jnp.isfinite(step.norm(PLUS))
    is_whole = jnp.asarray(outcome.is_defined) & fits(outcome.weights)
    # As indices: 0 is g, 1 what the rule wants instead of the penalty, 2 the method.
    choice = jnp.where(is_whole, 2, jnp.where(fits(outcome.instead), 1, 0))
    choice = jnp.where(step.is_perturbed & is_plus_finite, choice, 0)
    rows = zip(*(_padded(weights, size) for weights in (HERE, outcome.instead, outcome.weights)), strict=True)
    weights = [jax.lax.select_n(choice, *(jnp.asarray(w, lengths[0].dtype) for w in row)) for row in rows]
    is_method = choice == 2
    is_guarded = step.is_perturbed & ~(is_method & ~jnp.asarray(outcome.is_guarded))
    return weights, is_guarded, is_method & outcome.is_bounded


def _combined(weights: Sequence[jax.Array], basis: Basis, gradients: Sequence[Params]) -> Params:
    """The tree that the weights stand for, in the dtypes of g: one pass over the leaves. g and g⁺ are exact."""
    on_g, on_change, *others = weights
    is_alone = (on_g == 1) & jnp.all(jnp.stack([weight == 0 for weight in others])) if others else on_g == 1
    exact = jnp.where(is_alone & (on_change == 0), 0, jnp.where(is_alone & (on_change == 1), 1, 2))
    # The sum starts from g or from g⁺, whichever is nearer; then only a part of the change is added.
    is_near_plus = jnp.abs(on_change - on_g) < jnp.abs(on_change)
    rest = [jnp.where(is_near_plus, on_change - on_g, on_change), *others]

    def leaf(*row: jax.Array) -> jax.Array:
        g, plus, *_ = row
        total = on_g.astype(g.dtype) * jax.lax.select_n(is_near_plus, g, plus)
        for weight, vector in zip(rest, basis(*row)[1:], strict=True):
            total = total + weight.astype(g.dtype) * vector
        return jax.lax.select_n(exact, g, plus, total)

    return trees.cast_like(trees.wide_map(leaf, *gradients), gradients[0])


def _checked_cast(gradient: Params, grads: Params) -> tuple[Params, jax.Array]:
    """The gradient, or g where its cast to float16 overflowed; and whether it did. Of other dtypes nothing is read."""
    narrow = [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype == jnp.float16]
    if not narrow:
        return gradient, jnp.zeros((), bool)
    has_overflown = ~trees.all_finite(narrow)
    return trees.select(has_overflown, grads, gradient), has_overflown


def _largest_of(tree: Params) -> float:
    """The largest number that survives the cast to each of the tree's dtypes, whatever the rounding.

    float16 is left to :func:`_checked_cast`: in its narrow range a bound by norms would stop gradients that fit.
    """
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)} - {jnp.dtype(jnp.float16)}
    return min((float(jnp.finfo(dtype).max) for dtype in dtypes), default=math.inf) * (1 - 2**-8)


def are_valid(numbers: Mapping[str, jax.Array]) -> jax.Array:
    """Whether all numbers are finite and not negative; constants are checked at construction, schedules here."""
    return jnp.all(jnp.stack([jnp.isfinite(value) & (value >= 0) for value in numbers.values()]))


def value_at(value: optax.ScalarOrSchedule, count: Any, dtype: Any) -> jax.Array:
    """The value of a constant or schedule at a step count, as a strongly typed scalar."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def initial(kind: type[Any], params: Params) -> Any:
    """The diagnostics before the first step: zeros of the right types, each in a buffer of its own."""
    dtype = trees.wide_dtype(params)
    return kind(**{name: jnp.zeros((), jnp.int32 if name.endswith("_steps") else dtype) for name in kind._fields})


def accumulated(before: Any, now: Any) -> Any:
    """The diagnostics after a step: the new values in the dtypes of the old ones, and the counts added up."""

    def add(old: jax.Array, new: Any) -> jax.Array:
        value = jnp.asarray(new).astype(old.dtype)
        return old + value if jnp.issubdtype(old.dtype, jnp.integer) else value

    return jax.tree.map(add, before, now)


def _weighted_sum(weights: Weights, values: Sequence[jax.Array]) -> jax.Array:
    """Σ wᵢxᵢ over the weights that are not zero, whatever the others hold."""
    total = zero = jnp.zeros((), values[0].dtype)
    for weight, value in zip(weights, values, strict=False):
        if isinstance(weight, jax.Array):
            total = total + jax.lax.select_n(weight == 0, weight.astype(value.dtype) * value, zero)
        elif weight:
            total = total + weight * value
    return total


def _padded(weights: Weights, size: int) -> list[Scalar]:
    return [*weights, *(0.0,) * (size - len(weights))][:size]


def _checked_outcome(found: Any, size: int) -> Outcome:
    outcome = found if isinstance(found, Outcome) else Outcome(found)
    return outcome._replace(weights=_checked_weights(outcome.weights, size))


def _checked_weights(weights: Any, size: int) -> list[Scalar]:
    """The weights, one for each vector of the basis.

    Raises:
      TypeError: in one sentence, if a rule returned anything else.
    """
    expected = "(g, g⁺ − g)" if size == 2 else f"{size} vectors, (g, g⁺ − g, ...)"
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"A rule returns weights of {expected}, or an Outcome; this one returned {weights!r}.")
    if any(jnp.ndim(weight) for weight in weights):
        raise TypeError(f"A rule returns scalars, the weights of {expected}; this one returned {weights!r}.")
    if any(isinstance(weight, jax.Array) or weight for weight in weights[size:]):
        raise TypeError(
            f"This rule returned {len(weights)} weights where it has {expected}; a weight of g⁻ needs two_sided(...)."
        )
    return _padded(weights, size)


def sharpness_aware(
    loss_fn: LossFn | None,
    rule: Rule,
    rho: optax.ScalarOrSchedule,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
    perturbed_loss_fn: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a method from an ascent and a rule.

    Args:
      loss_fn: the loss; this and all other arguments but ``rule`` as in :func:`crsam_jax.crsam`.
      rule: how the gradients at w, w + ρv and further points become one.
      rho: ρ ≥ 0, a number or schedule.
      ascent: the rule for the direction v.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: how the loss is evaluated.
      perturbed_loss_fn: the loss at the perturbed points, if it is another one than at w:
        ``perturbed_loss_fn(point, center, **kwargs)``, where ``center`` is w and constant; its gradient by ``point``
        counts. It must have the value and the gradient of ``loss_fn`` at w, or the step counts as mismatched.

    Returns:
      The transformation, from the gradient g at w to the combined gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: at construction for bad arguments, at ``update`` for bad params or gradients.

    Example:
      A new method is one function, here "SAM minus half of the gradient":

      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax.engine import of_gradients, one_sided, sharpness_aware
      >>> def combine(step):
      ...   return of_gradients(here=-0.5, plus=1.0)
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = sharpness_aware(loss_fn, one_sided(combine), rho=1.0)
      >>> w = jnp.array([0.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # 0.5 w + 1.0 w/‖w‖
      [0. 3.]
    """
    method = Method.of(rule, rho, ascent, mask, execution)
    bind = LossBinder(loss_fn, has_aux)
    bind_perturbed = None if perturbed_loss_fn is None else LossBinder(perturbed_loss_fn, has_aux)

    def update(
        updates: Params,
        state: SharpnessAwareState,
        params: Params = None,
        *args: Any,
        loss: Any = None,
        **extra_args: Any,
    ) -> tuple[Params, SharpnessAwareState]:
        bind.refuse_positional(args)
        perturbed = None if bind_perturbed is None else bind_perturbed({**extra_args, "center": params})
        return method.gradient(bind(extra_args), updates, state, params, checked_loss(loss), perturbed)

    return optax.GradientTransformationExtraArgs(method.init, update)
