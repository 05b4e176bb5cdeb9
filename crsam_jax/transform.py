"""The one transformation that joins the rooms: gradient at w → direction → probes → combination.

Guards choose, they never blend: a NaN in a value that is not chosen does no harm.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _tree
from crsam_jax._checks import (
    ScalarOrSchedule,
    check_choice,
    check_gradient,
    check_hyperparameter,
    check_params,
    value_at,
)
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax.ascent import Ascent, Mask, gradient_ascent, masked_ascent
from crsam_jax.diagnostics import Diagnostics, accumulated, initial
from crsam_jax.penalties import Penalty, Step
from crsam_jax.probes import EVALUATIONS, evaluate, evaluate_loss, perturb, synced, varying

_LOSSES = ("loss_minus",)


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      count: int32, steps so far; schedules read it.
      ascent: state of the ascent.
      diagnostics: of the latest step; read one with ``optax.tree.get(opt_state, "curvature")``. Zeros before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # as in optax, the field hides tuple.count
    ascent: Any
    diagnostics: Diagnostics


def sharpness_aware(
    loss_fn: LossFn,
    penalty: Penalty,
    rho: ScalarOrSchedule,
    *,
    ascent: Ascent | None = None,
    evaluation: str = "auto",
    has_aux: bool = False,
    axis_name: str | None = None,
    sync_perturbation: bool = True,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a member of the family from an ascent and a penalty; :func:`crsam` describes the common arguments.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux=True``.
      penalty: how the gradients at w, w + ρv and further points become one.
      rho: ρ ≥ 0, a number or schedule.
      ascent: the rule for the direction v; ``None`` is :func:`gradient_ascent`.
      evaluation: ``"auto"``, ``"vmap"``, ``"sequential"`` or ``"ordered"``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probes' losses and gradients are averaged.
      sync_perturbation: whether all of the mapped axis share one perturbation.
      mask: which part of the params to perturb.

    Returns:
      The transformation, from the gradient g at w to the combined gradient, same structure and dtypes.

    Raises:
      TypeError, ValueError: at construction for bad arguments, at ``update`` for bad params or gradients.

    Example:
      A new member is one function, here "SAM minus a tenth of the gradient":

      >>> import jax, jax.numpy as jnp, optax, crsam_jax
      >>> def combine(g, g_plus):
      ...   return jax.tree.map(lambda a, b: b - 0.1 * a, g, g_plus)
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = crsam_jax.sharpness_aware(loss_fn, crsam_jax.one_sided_penalty(combine), rho=1.0)
      >>> w = jnp.array([3.0, 4.0])
      >>> gradient, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
      >>> print(gradient)  # 0.9 w + 1.0 w/‖w‖
      [3.3 4.4]
    """
    bind = LossBinder(loss_fn, has_aux)
    check_hyperparameter("rho", rho)
    check_choice("evaluation", evaluation, EVALUATIONS)
    _check_axis_name(axis_name)
    ascent = _checked_ascent(ascent)
    if mask is not None:
        ascent = masked_ascent(ascent, mask)

    def init(params: Any) -> SharpnessAwareState:
        return SharpnessAwareState(
            count=jnp.zeros((), jnp.int32),
            ascent=ascent.init(params),
            diagnostics=initial(penalty.diagnostics, _tree.wide_dtype(params)),
        )

    def update(
        updates: Any, state: SharpnessAwareState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SharpnessAwareState]:
        check_params(params)
        check_gradient(updates, params)
        dtype = _tree.wide_dtype(params)
        loss, local_axis = bind(extra_args), None if sync_perturbation else axis_name
        probe_axis = axis_name if sync_perturbation else None
        here = params if local_axis is None else varying(params, local_axis)

        def gradient_fn(point: Any, axis: str | None = probe_axis) -> Any:
            return evaluate(loss, [point], evaluation, axis)[0].grads

        direction, ascent_state = ascent.apply(updates, state.ascent, here, gradient_fn)
        gradient, seen = _combined(
            loss,
            penalty,
            {name: value_at(value, state.count, dtype) for name, value in penalty.hyperparams.items()},
            updates,
            here,
            direction,
            value_at(rho, state.count, dtype),
            state.count,
            evaluation,
            probe_axis,
        )
        if local_axis is not None:
            # The parts share one memory, that of a step with the averaged gradient.
            everywhere = partial(gradient_fn, axis=local_axis)
            _, ascent_state = ascent.apply(synced(updates, local_axis), state.ascent, params, everywhere)
            gradient, seen = synced((gradient, seen), local_axis)
        new_state = SharpnessAwareState(
            count=optax.safe_increment(state.count),
            ascent=ascent_state,
            diagnostics=accumulated(state.diagnostics, seen),
        )
        return gradient, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _combined(
    loss: Callable[[Any], jax.Array],
    penalty: Penalty,
    hyperparams: Mapping[str, jax.Array],
    grads: Any,
    params: Any,
    direction: Any,
    radius: jax.Array,
    count: jax.Array,
    evaluation: str,
    axis_name: str | None,
) -> tuple[Any, dict[str, Any]]:
    """One step: the combined gradient, in the dtypes of ``grads``, and what was seen on the way."""
    length = _tree.norm(direction)
    is_usable = _tree.all_finite(grads) & jnp.isfinite(length) & (length > 0)
    is_perturbed = is_usable & (radius != 0)
    direction = _tree.select(is_perturbed, direction, jax.tree.map(jnp.zeros_like, direction))

    points = [perturb(params, direction, radius), *penalty.points(params, direction, radius, count)]
    plus, *others = evaluate(loss, points, evaluation, axis_name)
    step = Step(
        loss=evaluate_loss(loss, params, axis_name),
        grads=grads,
        plus=plus,
        others=others,
        direction=direction,
        length=jnp.where(is_perturbed, length, 1),
        radius=jnp.where(is_perturbed, radius, 1),
        count=count,
    )
    gradient, seen = penalty.combine(step, **hyperparams)
    plus_is_finite = jnp.isfinite(plus.loss) & _tree.all_finite(plus.grads)
    is_valid = is_perturbed & plus_is_finite
    gradient = _tree.select(is_valid, _tree.cast_like(gradient, grads), grads)

    # Where nothing was perturbed, there is nothing to report but losses, and nothing of the penalty's to count.
    seen = {name: value if name in _LOSSES else jnp.where(is_perturbed, value, 0) for name, value in seen.items()}
    return gradient, seen | {
        "loss": step.loss,
        "loss_plus": plus.loss,
        "grad_norm": _tree.norm(grads),
        "cosine": _tree.cosine(grads, gradient),
        "guarded_steps": seen["guarded_steps"] | ~is_usable | (is_perturbed & ~plus_is_finite),
        "bounded_steps": seen.get("bounded_steps", False) & is_valid,
    }


def _checked_ascent(ascent: Ascent | None) -> Ascent:
    if ascent is None:
        return gradient_ascent()
    if not isinstance(ascent, Ascent):
        raise TypeError(
            f"ascent must be an Ascent, such as crsam_jax.adaptive_ascent(), or None; got {ascent!r}"
            + (" (call it to make one)." if callable(ascent) else ".")
        )
    return ascent


def _check_axis_name(axis_name: str | None) -> None:
    if not (axis_name is None or isinstance(axis_name, str)):
        raise TypeError(f"axis_name must be the name of one mapped axis or None, got {axis_name!r}.")
