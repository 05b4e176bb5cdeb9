"""A base optimizer on shifted params: the perturbation is known before the gradient, from a vector of past gradients.

Between two steps the params that the caller holds are the shifted ones, w̃ = w + e, with e = ±ρ m/‖m‖ known from the
state:

    g = ∇L(w̃)                          by the caller, at the params that it holds
    w ← w̃ − e                          undo the shift
    w ← w + base(g, w)                 the base optimizer's step, from w
    m ← μ m + g  (MSAM)  or  g  (S²-SAM)
    w̃ = w + e, with the new m          what ``optax.apply_updates`` makes of the updates returned

:func:`eval_params` undoes the shift for evaluation, as ``optax.contrib.schedule_free_eval_params`` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax.ascents.ascent import broadcast_mask, masked
from crsam_jax.step import trees
from crsam_jax.step.checks import check_gradient, check_hyperparameter, check_leaves, check_params, is_hidden, value_at
from crsam_jax.step.diagnostics import accumulated, initial
from crsam_jax.step.fallbacks import are_valid
from crsam_jax.step.types import Mask, Params, Scalar, ScalarOrSchedule


class OneEvaluationDiagnostics(NamedTuple):
    """What a step saw whose gradient was taken at w̃ = w + ρv.

    Attributes:
      grad_norm: ‖∇L(w̃)‖ over the whole tree.
      slope: ⟨v, ∇L(w̃)⟩, of the loss along the perturbation: positive where it goes uphill. 0 if there was none.
      guarded_steps: after how many gradients so far there was no perturbation to be had: the gradient was not finite,
        m zero or too large, ρ negative or not finite, or the updates overflow.
    """

    grad_norm: jax.Array
    slope: jax.Array
    guarded_steps: jax.Array


class Shift(NamedTuple):
    """The perturbation e = ρ v, v = m · scale · factor, in scalars; ρ = 0 where params are not shifted.

    Attributes:
      rho: ρ.
      scale: a power of two that brings ‖m‖ into range.
      factor: ±1 over the length that is left.
    """

    rho: jax.Array
    scale: jax.Array
    factor: jax.Array


class OneEvaluationState(NamedTuple):
    """State of :func:`msam` and :func:`s2sam`.

    Attributes:
      count: int32, steps of the base optimizer so far; a schedule of ρ reads it.
      memory: m, a tree like params.
      shift: by how much the params that the caller holds are shifted, in terms of m.
      diagnostics: what the latest step saw; ``optax.tree.get(opt_state, "slope")`` reads one. Zeros before the first.
      base_optimizer_state: the state of the base optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # as in optax, the field hides tuple.count
    memory: Params
    shift: Shift
    diagnostics: OneEvaluationDiagnostics
    base_optimizer_state: Any


def eval_params(opt_state: Any, params: Params) -> Params:
    """The params w without the shift, to evaluate, average and export.

    Args:
      opt_state: an optimizer state with :func:`msam` or :func:`s2sam` in it, wherever that stands in it, that of an
        ``nnx.Optimizer`` too.
      params: w̃, those that belong to ``opt_state``.

    Returns:
      w, a tree like params, same dtypes.

    Raises:
      ValueError: if there is neither in ``opt_state``.

    Example:
      >>> import jax.numpy as jnp, optax, crsam_jax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), crsam_jax.s2sam(optax.sgd(0.5), rho=0.5))
      >>> params = jnp.array([0.0, 4.0])
      >>> updates, state = tx.update(jnp.array([0.0, 2.0]), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, crsam_jax.eval_params(state, params))
      [0. 4.] [0.  3.5]
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, OneEvaluationState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(node)]
    if not found:
        raise ValueError("opt_state holds no state of msam or s2sam, so params are not shifted.")
    for state in found:
        params = _without(params, _like(params, _perturbation(state.memory, state.shift)))
    return params


def shifted(
    name: str,
    base_optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    decay: Scalar | None,
    sign: float,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """The base optimizer on params shifted by e = sign · ρ m/‖m‖, with m ← decay · m + g; ``None``: m is the latest g.

    Raises:
      TypeError, ValueError: for bad arguments; the message says that they are those of ``name``.
    """
    if not isinstance(base_optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{name} wraps a base optimizer, such as optax.sgd(0.1, momentum=0.9), and needs no loss_fn; "
            f"got {base_optimizer!r}."
        )
    check_hyperparameter("rho", rho)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Params) -> OneEvaluationState:
        check_leaves(_shown(params))
        dtype = trees.wide_dtype(params)
        memory_dtype = None if decay is None else dtype
        return OneEvaluationState(
            count=jnp.zeros((), jnp.int32),
            memory=jax.tree.map(lambda p: jnp.zeros_like(p, memory_dtype), params),
            shift=Shift(*(jnp.zeros((), dtype) for _ in Shift._fields)),
            diagnostics=initial(OneEvaluationDiagnostics, dtype),
            base_optimizer_state=base.init(params),
        )

    def update(
        updates: Params, state: OneEvaluationState, params: Params = None, **extra_args: Any
    ) -> tuple[Params, OneEvaluationState]:
        _check(name, updates, params)
        grad_norm = trees.scaled_norm(updates)
        is_finite = jnp.isfinite(grad_norm.length)
        before = _perturbation(state.memory, state.shift)

        w, old, zeros = _without(params, before), state.base_optimizer_state, jax.tree.map(jnp.zeros_like, updates)
        step, base_state = base.update(trees.select(is_finite, updates, zeros), old, w, **extra_args)
        step, base_state = trees.select(is_finite, step, zeros), trees.select(is_finite, base_state, old)

        count = jnp.where(is_finite, optax.safe_increment(state.count), state.count)
        memory = _remembered(state.memory, _inside(mask, updates, params), decay)
        length = trees.scaled_norm(memory)
        radius = value_at(rho, count, state.shift.rho.dtype)
        is_usable = is_finite & length.is_usable & are_valid({"rho": radius})
        shift = _shift(length, jnp.where(is_usable, radius, 0), sign)
        result, is_whole = _moved(step, _perturbation(memory, shift), before, updates)
        is_shifted = is_usable & is_whole
        slope = trees.dot(_direction(state.memory, state.shift), updates)
        seen = OneEvaluationDiagnostics(grad_norm.value, slope, ~is_shifted)
        new_state = OneEvaluationState(
            count=count,
            memory=trees.select(is_finite & jnp.isfinite(length.length), memory, state.memory),
            shift=trees.select(is_shifted, shift, jax.tree.map(jnp.zeros_like, shift)),
            diagnostics=accumulated(state.diagnostics, seen),
            base_optimizer_state=base_state,
        )
        return result, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(step: Params, e: Params, before: Params, like: Params) -> tuple[Params, jax.Array]:
    """The updates to the next shifted params, or to unshifted ones if those overflow; and whether they are shifted."""
    moved = trees.cast_like(trees.wide_map(lambda u, e, before: u + (e - before), step, e, before), like)
    undone = trees.cast_like(trees.wide_map(jnp.subtract, step, before), like)
    is_whole = trees.all_finite(moved)
    return trees.select(is_whole, moved, undone), is_whole


def _inside(mask: Mask | None, grads: Params, params: Params) -> Params:
    """The gradient, zero outside the mask."""
    if mask is None:
        return grads
    return masked(grads, broadcast_mask("mask", mask, params))


def _remembered(memory: Params, grads: Params, decay: Scalar | None) -> Params:
    new = grads if decay is None else trees.wide_map(lambda m, g: decay * m + g, memory, grads)
    return trees.cast_like(new, memory)


def _shift(length: trees.ScaledNorm, rho: jax.Array, sign: float) -> Shift:
    scale, factor = trees.unit_factors(length)
    return Shift(rho, jnp.where(rho == 0, 0, scale), jnp.where(rho == 0, 0, sign * factor))


def _direction(memory: Params, shift: Shift) -> Params:
    """The direction v, of length 1 or 0, in at least float32."""
    return trees.scaled_by(memory, shift.scale, shift.factor)


def _perturbation(memory: Params, shift: Shift) -> Params:
    return jax.tree.map(lambda v: shift.rho.astype(v.dtype) * v, _direction(memory, shift))


def _without(params: Params, perturbation: Params) -> Params:
    """The params w, without the shift; parts that an optimizer around this one has hidden stay as they are."""

    def subtract(e: Any, shifted: Any) -> Any:
        if is_hidden(e):
            return shifted
        return (trees.widen(shifted) - e).astype(jnp.result_type(shifted))

    return jax.tree.map(subtract, perturbation, params, is_leaf=is_hidden)


def _like(params: Params, perturbation: Params) -> Params:
    """The perturbation in the nodes of params: those of an nnx.Optimizer's state are variables of another kind."""
    (leaves, _), (others, structure) = jax.tree.flatten(perturbation), jax.tree.flatten(params)
    is_alike = list(map(jnp.shape, leaves)) == list(map(jnp.shape, others))
    return jax.tree.unflatten(structure, leaves) if is_alike else perturbation


def _check(name: str, grads: Params, params: Params) -> None:
    if params is None:
        raise ValueError(f"params is None, but {name} moves them: call update(grads, state, params).")

    check_params(_shown(params))
    check_gradient(grads, params)


def _shown(params: Params) -> Params:
    """The params without the parts that an optimizer around this one has hidden."""
    return jax.tree.map(lambda leaf: None if is_hidden(leaf) else leaf, params, is_leaf=is_hidden)
