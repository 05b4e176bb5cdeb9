"""A method as a rule over scalars: from losses, inner products and its numbers to a combination of gradients.

All that a method needs to know of its gradients is a handful of inner products, and what it returns is a linear
combination. A rule is written with symbols (:class:`crsam_jax.Vector`) and scalars alone, and can be tested on them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax.step.products import Products
from crsam_jax.step.types import Evaluation, Params, ScalarOrSchedule
from crsam_jax.step.vectors import Vector

# Each number in a difference is taken to be wrong by this many units in the last place.
NOISE_ULPS = 4


class Point(NamedTuple):
    """A point at which a step evaluated the loss.

    Attributes:
      loss: a scalar, in at least float32.
      grad: its gradient, as a symbol.
    """

    loss: jax.Array
    grad: Vector


class Step(NamedTuple):
    """What a step saw.

    Attributes:
      here: w, with L and g.
      plus: w + ρv, with L⁺ and g⁺.
      losses: the losses at the rule's further points.
      vectors: the gradients there, or what the rule's ``basis`` made of them.
      rho: ρ; 1 where nothing is perturbed, so that it divides safely.
      products: inner products and norms of vectors.
      loss_epsilon: relative rounding error of a loss, in the narrowest dtype that one came in.
      is_perturbed: whether there is a perturbation.
      params: w, for a rule that asks for shapes.
    """

    here: Point
    plus: Point
    losses: Sequence[jax.Array]
    vectors: Sequence[Vector]
    rho: jax.Array
    products: Products
    loss_epsilon: float
    is_perturbed: jax.Array
    params: Params

    @property
    def minus(self) -> Point:
        """The first further point, which is w − ρv in a two-sided rule."""
        return Point(self.losses[0], self.vectors[0])

    @property
    def further(self) -> list[Point]:
        """All points beside w and w + ρv."""
        return [Point(loss, vector) for loss, vector in zip(self.losses, self.vectors, strict=True)]

    @property
    def reach(self) -> jax.Array:
        """ρ‖v‖, the distance from w to w + ρv; 1 where nothing is perturbed."""
        return jnp.where(self.is_perturbed, self.rho * self.products.direction_norm, 1)

    @property
    def curvature(self) -> jax.Array:
        """⟨v, g⁺ − g⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖²; subtracted leaf by leaf, so that it does not cancel."""
        along = self.products.along(self.plus.grad - self.here.grad)
        return jnp.where(self.is_perturbed, along * self.rho / self.reach**2, 0)

    def loss_noise(self, *losses: jax.Array) -> jax.Array:
        """The rounding error of a sum of the losses."""
        return NOISE_ULPS * self.loss_epsilon * sum((abs(loss) for loss in losses), jnp.zeros(()))


class Outcome(NamedTuple):
    """What a rule makes of a step.

    Attributes:
      gradient: the method's gradient.
      penalty: the part of it to leave out where it is not defined, before any bound; None if there is none.
      instead: what is returned without the penalty, SAM's gradient. Where it is not finite either, the step returns g.
      is_defined: whether the penalty is defined.
      is_guarded: whether part of the penalty was left out by the rule itself.
      is_bounded: whether the penalty was scaled down.
    """

    gradient: Vector
    penalty: Vector | None = None
    instead: Vector | None = None
    is_defined: jax.Array | bool = True
    is_guarded: jax.Array | bool = False
    is_bounded: jax.Array | bool = False


class Seen(NamedTuple):
    """What every method reports of a step: scalars, and flags for this step alone."""

    loss: jax.Array
    loss_plus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    is_guarded: jax.Array
    is_bounded: jax.Array


class Basis(NamedTuple):
    """The trees whose inner products a rule needs beside g and g⁺ − g, and the symbols for them.

    Attributes:
      elements: elementwise, from arrays of g, g⁺ and the further gradients to a list of arrays.
      vectors: what a step gets as ``vectors``, with weights on (g, g⁺ − g, *elements).
    """

    elements: Callable[..., Sequence[jax.Array]]
    vectors: Sequence[Vector]


def no_points(params: Params, direction: Params, rho: jax.Array, count: jax.Array) -> list[Params]:
    """No point beside w + ρv."""
    del params, direction, rho, count
    return []


def differences(here: Evaluation, plus: Evaluation, further: Sequence[Evaluation]) -> Basis:
    """The basis of gradients at any points: gᵢ − g of each."""
    del here, plus
    units = [tuple(float(i == j) for j in range(len(further))) for i in range(len(further))]
    return Basis(lambda g, plus, *others: [at - g for at in others], [Vector((1.0, 0.0, *unit)) for unit in units])


class Rule(NamedTuple):
    """A method: the points it looks at, and what it makes of them.

    Attributes:
      combine: ``(step, **numbers) -> Vector | Outcome``, the method's formula.
      report: ``(step, outcome, seen) -> Diagnostics``, with flags of this step as its counts.
      diagnostics: the type that ``report`` returns.
      numbers: the formula's numbers or schedules by name, handed to ``combine`` as float scalars.
      points: ``(params, direction, rho, count) -> points`` beside w + ρv.
      basis: ``(here, plus, further) -> Basis``, from the evaluations there.
      reads_gradient: whether the formula or the report reads g, or L at w. ``False``: g gives v and nothing else, so
        that it may be that of a part of the batch; L(w) is not evaluated, and is NaN in the step.

    Example:
      A two-sided member, the mean of g⁺ and g⁻:

      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> def mean(step):
      ...   return (step.plus.grad + step.minus.grad) / 2
      >>> loss_fn = lambda w: jnp.sum(w**3) / 3
      >>> tx = crsam_jax.sharpness_aware(loss_fn, crsam_jax.two_sided(mean), rho=5.0)
      >>> w = jnp.array([0.0, 2.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # w² + (ρv)²
      [ 0. 29.]
    """

    combine: Callable[..., Vector | Outcome]
    report: Callable[[Step, Outcome, Seen], Any]
    diagnostics: type[Any]
    numbers: Mapping[str, ScalarOrSchedule]
    points: Callable[[Params, Params, jax.Array, jax.Array], Sequence[Params]] = no_points
    basis: Callable[[Evaluation, Evaluation, Sequence[Evaluation]], Basis] = differences
    reads_gradient: bool = True
