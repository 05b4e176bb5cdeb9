"""One step: gradient at w → direction → probes → rule → gradient for the next link of the chain."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.ascents.ascent import GRADIENT_ASCENT, Ascent, checked_ascent, masked_ascent
from crsam_jax.step import fallbacks, trees
from crsam_jax.step.axes import synced, varying
from crsam_jax.step.checks import check_gradient, check_hyperparameter, check_leaves, check_params, value_at
from crsam_jax.step.diagnostics import Diagnostics, accumulated, initial
from crsam_jax.step.evaluation import evaluate, loss_at, perturb
from crsam_jax.step.execution import Execution, checked_execution
from crsam_jax.step.loss import LossBinder, checked_loss
from crsam_jax.step.products import products_of
from crsam_jax.step.rule import Outcome, Point, Rule, Seen, Step
from crsam_jax.step.types import Evaluation, Loss, LossFn, Mask, Params, ScalarOrSchedule
from crsam_jax.step.vectors import Vector, combined, where


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      count: int32, steps so far; schedules read it.
      ascent: the state of the ascent.
      diagnostics: what the latest step saw; ``optax.tree.get(opt_state, "curvature")`` reads one. Zeros at first.
    """

    count: jax.Array  # type: ignore[assignment]  # as in optax, the field hides tuple.count
    ascent: Any
    diagnostics: Diagnostics


@dataclasses.dataclass(frozen=True)
class Method:
    """A member of the family: where it looks, what it makes of that, and how it is carried out.

    Attributes:
      rule: how the gradients become one.
      rho: ρ, a number or schedule.
      ascent: the rule for v.
      execution: strategy and axes.
    """

    rule: Rule
    rho: ScalarOrSchedule
    ascent: Ascent
    execution: Execution

    @classmethod
    def of(
        cls, rule: Rule, rho: ScalarOrSchedule, ascent: Ascent | None, mask: Mask | None, execution: Execution | None
    ) -> "Method":
        """A method from its parts, checked and with the defaults filled in."""
        check_hyperparameter("rho", rho)
        ascent = checked_ascent(ascent)
        return cls(rule, rho, ascent if mask is None else masked_ascent(ascent, mask), checked_execution(execution))

    def init(self, params: Params) -> SharpnessAwareState:
        """The state before the first step."""
        check_leaves(params)
        return SharpnessAwareState(
            count=jnp.zeros((), jnp.int32),
            ascent=self.ascent.init(params),
            diagnostics=initial(self.rule.diagnostics, trees.wide_dtype(params)),
        )

    def gradient(
        self, loss: Loss, grads: Params, state: SharpnessAwareState, params: Params, loss_here: Any = None
    ) -> tuple[Params, SharpnessAwareState]:
        """The method's gradient and the state after the step.

        Args:
          loss: the loss as a function of params alone.
          grads: g, its gradient at params.
          state: the state before the step.
          params: w.
          loss_here: L(w) if the caller has it.
        """
        check_params(params)
        check_gradient(grads, params)
        axis = self.execution.local_axis
        here = varying(params, axis)
        direction, memory = self._direction(loss, grads, state.ascent, here, self.execution)
        gradient, seen = self._step(loss, grads, state.count, here, direction, loss_here)
        if axis is not None:
            # All parts of the batch go on with one memory: the one that a step with the averaged gradient leaves.
            averaging = dataclasses.replace(self.execution, sync_perturbation=True)
            _, memory = self._direction(loss, synced(grads, axis), state.ascent, params, averaging)
            gradient, seen = synced((gradient, seen), axis)
        return gradient, SharpnessAwareState(
            count=optax.safe_increment(state.count), ascent=memory, diagnostics=accumulated(state.diagnostics, seen)
        )

    def _direction(
        self, loss: Loss, grads: Params, memory: Any, params: Params, execution: Execution
    ) -> tuple[Params | None, Any]:
        """The direction v and the ascent's new state; v is None where it is the gradient's own direction."""
        if self.ascent == GRADIENT_ASCENT:
            return None, memory

        def gradient_fn(point: Params) -> Params:
            return evaluate(loss, [point], execution)[0].grads

        return self.ascent.apply(grads, memory, params, gradient_fn)

    def _step(
        self, loss: Loss, grads: Params, count: jax.Array, params: Params, direction: Params | None, loss_here: Any
    ) -> tuple[Params, Diagnostics]:
        dtype = trees.wide_dtype(params)
        rho = value_at(self.rho, count, dtype)
        numbers = {name: value_at(value, count, dtype) for name, value in self.rule.numbers.items()}
        grad_norm = trees.scaled_norm(grads)
        is_usable = grad_norm.is_usable & fallbacks.are_valid({"rho": rho, **numbers})
        v = _chosen_direction(grads, grad_norm, direction, is_usable & (rho != 0))
        points = [perturb(params, v, rho), *self.rule.points(params, v, rho, count)]
        if self.rule.reads_gradient:
            loss_here = loss_at(loss, params, loss_here, self.execution.averaging_axis)
        else:  # the rule does not look at L(w)
            loss_here = jnp.full((), jnp.nan, dtype)
        plus, *further = evaluate(loss, points, self.execution)
        basis = self.rule.basis(Evaluation(loss_here, grads), plus, further)
        gradients = [grads, plus.grads, *(at.grads for at in further)]
        rest = (0.0,) * (len(basis.vectors[0].weights) - 2) if basis.vectors else ()
        products = products_of(basis.elements, 2 + len(rest), gradients, grad_norm, direction)
        is_usable = is_usable & (products.direction_norm > 0) & jnp.isfinite(products.direction_norm)
        is_perturbed = is_usable & (rho != 0)
        step = Step(
            here=Point(trees.widen(loss_here), Vector((1.0, 0.0, *rest))),
            plus=Point(trees.widen(plus.loss), Vector((1.0, 1.0, *rest))),
            losses=[trees.widen(at.loss) for at in further],
            vectors=basis.vectors,
            rho=jnp.where(is_perturbed, rho, 1),
            products=products,
            loss_epsilon=max(float(jnp.finfo(loss.dtype).eps) for loss in (loss_here, plus.loss)),
            is_perturbed=is_perturbed,
            params=params,
        )
        outcome = self.rule.combine(step, **numbers)
        if isinstance(outcome, Vector):
            outcome = Outcome(outcome)
        vector, is_guarded, is_bounded = fallbacks.settled(step, outcome, fallbacks.largest_of(grads))
        gradient = combined(vector, basis.elements, *gradients)
        gradient, has_overflown = fallbacks.checked(gradient, grads)
        seen = Seen(
            loss=loss_here,
            loss_plus=plus.loss,
            grad_norm=grad_norm.value,
            cosine=products.cosine(step.here.grad, where(has_overflown, step.here.grad, vector)),
            is_guarded=~is_usable | is_guarded | has_overflown,
            is_bounded=is_bounded & ~has_overflown,
        )
        return gradient, self.rule.report(step, outcome, seen)


def _chosen_direction(
    grads: Params, grad_norm: trees.ScaledNorm, direction: Params | None, is_perturbed: jax.Array
) -> Params:
    """The v to move along; zeros where nothing is to be perturbed."""
    if direction is None:
        scale, factor = trees.unit_factors(grad_norm)
        return trees.scaled_by(grads, scale, jnp.where(is_perturbed, factor, 0))
    return trees.select(is_perturbed, direction, jax.tree.map(jnp.zeros_like, direction))


def sharpness_aware(
    loss_fn: LossFn,
    rule: Rule,
    rho: ScalarOrSchedule,
    *,
    ascent: Ascent | None = None,
    has_aux: bool = False,
    mask: Mask | None = None,
    execution: Execution | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a member of the family from an ascent and a rule; :func:`crsam_jax.crsam` describes the common arguments.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux=True``.
      rule: how the gradients at w, w + ρv and further points become one.
      rho: ρ ≥ 0, a number or schedule.
      ascent: the rule for the direction v; ``None`` is :func:`crsam_jax.gradient_ascent`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      mask: which part of the params to perturb.
      execution: how the loss is evaluated.

    Returns:
      The transformation, from the gradient g at w to the combined gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: at construction for bad arguments, at ``update`` for bad params or gradients.

    Example:
      A new member is one function, here "SAM minus half of the gradient":

      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> def combine(step):
      ...   return step.plus.grad - 0.5 * step.here.grad
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.sharpness_aware(loss_fn, crsam_jax.one_sided(combine), rho=1.0)
      >>> w = jnp.array([0.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # 0.5 w + 1.0 w/‖w‖
      [0. 3.]
    """
    method = Method.of(rule, rho, ascent, mask, execution)
    bind = LossBinder(loss_fn, has_aux)

    def update(
        updates: Params,
        state: SharpnessAwareState,
        params: Params = None,
        *args: Any,
        loss: Any = None,
        **extra_args: Any,
    ) -> tuple[Params, SharpnessAwareState]:
        bind.refuse_positional(args)
        return method.gradient(bind(extra_args), updates, state, params, checked_loss(loss))

    return optax.GradientTransformationExtraArgs(method.init, update)
