"""The one transformation that joins the rooms: gradient at w → direction → probes → combination.

Guards choose, they never blend: a NaN in a value that is not chosen does no harm.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from crsam_jax.penalties import Penalty, Term, second_difference
from crsam_jax.probes import EVALUATIONS, Evaluation, evaluate, evaluate_loss, perturb


class OneSidedDiagnostics(NamedTuple):
    """What a step at w and w + ρv saw: scalars in float32, or float64 if the params are.

    Attributes:
      loss: L(w).
      loss_plus: L(w + ρv).
      grad_norm: ‖g‖ over the whole tree.
      cosine: cosine of the angle between g and the gradient returned.
      curvature: ⟨v, g⁺ − g⟩/(ρ‖v‖²) ≈ vᵀHv/‖v‖²; 0 where nothing was perturbed.
      guarded_steps: int32, how many steps so far fell back on g.
    """

    loss: jax.Array
    loss_plus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    curvature: jax.Array
    guarded_steps: jax.Array


class TwoSidedDiagnostics(NamedTuple):
    """What a step at w, w + ρv and w − ρv saw: scalars in float32, or float64 if the params are.

    Attributes:
      loss: L(w). Equals the caller's own loss if the gradient passed in belongs to the same loss.
      loss_plus: L⁺ = L(w + ρv).
      loss_minus: L⁻ = L(w − ρv).
      grad_norm: ‖g‖ over the whole tree.
      cosine: cosine of the angle between g and the gradient returned.
      slope: (L⁺ − L⁻)/(2ρ‖v‖) ≈ vᵀ∇L/‖v‖, which is ‖g‖ along the gradient. Far from ``grad_norm`` means that
        the gradient passed in is not that of the loss: other data, other dropout mask, scaled or clipped.
      curvature: (L⁺ + L⁻ − 2L)/(ρ²‖v‖²) ≈ vᵀHv/‖v‖²; 0 where nothing was perturbed, as ``slope`` is.
      normalized_curvature: curvature/‖g‖, the paper's C(w) along v.
      penalty_ratio: ‖penalty's gradient‖/‖g⁺‖ before the bound.
      guarded_steps: int32, how many steps so far left a term out, or fell back on g⁺ or g.
      bounded_steps: int32, in how many steps so far the penalty was scaled down to its bound.
    """

    loss: jax.Array
    loss_plus: jax.Array
    loss_minus: jax.Array
    grad_norm: jax.Array
    cosine: jax.Array
    slope: jax.Array
    curvature: jax.Array
    normalized_curvature: jax.Array
    penalty_ratio: jax.Array
    guarded_steps: jax.Array
    bounded_steps: jax.Array


Diagnostics = OneSidedDiagnostics | TwoSidedDiagnostics


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
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a member of the family from an ascent and a penalty; :func:`crsam` describes the common arguments.

    Args:
      loss_fn: ``loss_fn(params, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux=True``.
      penalty: how the gradients at w, w + ρv and w − ρv become one.
      rho: ρ ≥ 0, a number or schedule.
      ascent: the rule for the direction v; ``None`` is :func:`gradient_ascent`.
      evaluation: ``"auto"``, ``"vmap"``, ``"sequential"`` or ``"ordered"``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      axis_name: mapped axis over which the probes' losses and gradients are averaged.
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
      >>> tx = crsam_jax.sharpness_aware(loss_fn, crsam_jax.Penalty(False, {}, combine), rho=1.0)
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
            diagnostics=_initial_diagnostics(penalty.two_sided, _tree.wide_dtype(params)),
        )

    def update(
        updates: Any, state: SharpnessAwareState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SharpnessAwareState]:
        check_params(params)
        check_gradient(updates, params)
        dtype = _tree.wide_dtype(params)
        radius = value_at(rho, state.count, dtype)
        hyperparams = {name: value_at(value, state.count, dtype) for name, value in penalty.hyperparams.items()}
        direction, ascent_state = ascent.apply(updates, state.ascent, params)
        gradient, diagnostics = _step(
            bind(extra_args), penalty, hyperparams, updates, params, direction, radius, evaluation, axis_name
        )
        new_state = SharpnessAwareState(
            count=optax.safe_increment(state.count),
            ascent=ascent_state,
            diagnostics=_accumulated(state.diagnostics, diagnostics),
        )
        return gradient, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    loss: Any,
    penalty: Penalty,
    hyperparams: Mapping[str, jax.Array],
    grads: Any,
    params: Any,
    direction: Any,
    radius: jax.Array,
    evaluation: str,
    axis_name: str | None,
) -> tuple[Any, Diagnostics]:
    """One step: the combined gradient, in the dtypes of ``grads``, and what was seen on the way."""
    length = _tree.norm(direction)
    usable = _tree.all_finite(grads) & jnp.isfinite(length) & (length > 0)
    is_perturbed = usable & (radius != 0)
    safe_radius = jnp.where(is_perturbed, radius, 0)
    direction = _tree.select(usable, direction, jax.tree.map(jnp.zeros_like, direction))

    center = Evaluation(evaluate_loss(loss, params, axis_name), grads)
    signs = (1, -1) if penalty.two_sided else (1,)
    points = [perturb(params, direction, sign * safe_radius) for sign in signs]
    probes = evaluate(loss, points, evaluation, axis_name)
    plus = probes[0]

    if penalty.two_sided:
        gradient, term = penalty.combine(center, *probes, **hyperparams)
    else:
        gradient, term = penalty.combine(grads, plus.grads, **hyperparams), None
    plus_is_finite = jnp.isfinite(plus.loss) & _tree.all_finite(plus.grads)
    gradient = _tree.select(is_perturbed & plus_is_finite, _tree.cast_like(gradient, grads), grads)
    guarded = ~usable | (is_perturbed & ~plus_is_finite)

    reach = jnp.where(is_perturbed, safe_radius * length, 1)  # ‖e‖ = ρ‖v‖, the distance probed
    common = {
        "loss": center.loss,
        "loss_plus": plus.loss,
        "grad_norm": _tree.norm(grads),
        "cosine": _tree.cosine(grads, gradient),
    }
    if term is None:
        change = _tree.wide_map(jnp.subtract, plus.grads, grads)  # first, or the difference of dots cancels
        return gradient, OneSidedDiagnostics(
            **common,
            curvature=jnp.where(is_perturbed, _tree.dot(direction, change) / (reach * length), 0),
            guarded_steps=guarded,
        )
    return gradient, _two_sided_diagnostics(common, center, plus, probes[1], term, is_perturbed, guarded, reach)


def _two_sided_diagnostics(
    common: Mapping[str, jax.Array],
    center: Evaluation,
    plus: Evaluation,
    minus: Evaluation,
    term: Term,
    is_perturbed: jax.Array,
    guarded: jax.Array,
    reach: jax.Array,
) -> TwoSidedDiagnostics:
    loss, loss_plus, loss_minus = _tree.widen((center.loss, plus.loss, minus.loss))
    second = jnp.where(is_perturbed, second_difference(loss, loss_plus, loss_minus) / reach**2, 0)
    grad_norm = common["grad_norm"]
    return TwoSidedDiagnostics(
        **common,
        loss_minus=minus.loss,
        slope=jnp.where(is_perturbed, (loss_plus - loss_minus) / (2 * reach), 0),
        curvature=second,
        normalized_curvature=jnp.where(grad_norm > 0, second / jnp.where(grad_norm > 0, grad_norm, 1), 0),
        penalty_ratio=jnp.where(is_perturbed, term.ratio, 0),
        guarded_steps=guarded | (is_perturbed & term.guarded),
        bounded_steps=is_perturbed & term.bounded & ~guarded,
    )


_COUNTS = ("guarded_steps", "bounded_steps")


def _initial_diagnostics(two_sided: bool, dtype: np.dtype) -> Diagnostics:
    kind = TwoSidedDiagnostics if two_sided else OneSidedDiagnostics
    return kind(**{name: jnp.zeros((), jnp.int32 if name in _COUNTS else dtype) for name in kind._fields})


def _accumulated(before: Diagnostics, now: Diagnostics) -> Diagnostics:
    """The new values in the old dtypes; counts added up."""
    values = {name: value.astype(getattr(before, name).dtype) for name, value in now._asdict().items()}
    for name in _COUNTS:
        if name in values:
            values[name] = getattr(before, name) + values[name]
    return type(before)(**values)


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
