"""MSAM and S²-SAM: a base optimizer on shifted params, at one evaluation per step.

The perturbation is known before the gradient, from a vector of past gradients.

Between two steps the params that the caller holds are the shifted ones, w̃ = w + e, with e = ±ρ m/‖m‖ known from the
state:

    g = ∇L(w̃)                          by the caller, at the params that it holds
    w ← w̃ − e                          undo the shift
    w ← w + base(g, w)                 the base optimizer's step, from w
    m ← μ m + g  (MSAM)  or  g  (S²-SAM)
    w̃ = w + e, with the new m          what ``optax.apply_updates`` makes of the updates returned

:func:`crsam_jax.eval_params` undoes the shift for evaluation, as ``optax.contrib.schedule_free_eval_params`` does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._checks import check_hyperparameter, check_number
from crsam_jax._trees import Params, check_gradient, check_leaves, check_params, is_hidden
from crsam_jax.ascents import Mask, check_mask, masked, perturbed_part
from crsam_jax.engine import Scalar, accumulated, are_valid, initial, value_at

__all__ = ["OneEvaluationDiagnostics", "OneEvaluationState", "eval_params", "msam", "s2sam"]


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
    """State of :func:`crsam_jax.msam` and :func:`crsam_jax.s2sam`.

    Attributes:
      step_count: int32, steps of the base optimizer so far; a schedule of ρ reads it.
      memory: m, a tree like params.
      shift: by how much the params that the caller holds are shifted, in terms of m.
      diagnostics: what the latest step saw; ``optax.tree.get(opt_state, "slope")`` reads one. Zeros before the first.
      base_optimizer_state: the state of the base optimizer.
    """

    step_count: jax.Array
    memory: Params
    shift: Shift
    diagnostics: OneEvaluationDiagnostics
    base_optimizer_state: Any


def msam(
    base_optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.3,
    decay: Scalar = 0.9,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: the gradient at :math:`w_t - \rho\, m_t/\|m_t\|`, one evaluation a step.

    .. math::

        \begin{align*}
        g_t &= \nabla L(w_t - \rho\, m_t / \|m_t\|), \\
        w_{t+1} &= w_t + \mathrm{base}(g_t, w_t), \\
        m_{t+1} &= \mu\, m_t + g_t, \qquad m_0 = 0.
        \end{align*}

    The minus sign is the paper's: the perturbation goes along the step that momentum takes, as Nesterov's does, but by
    a fixed length. The first gradient is that at w₀.

    **The params that the caller holds are the shifted ones.** Loss and gradient of the training step are those there;
    evaluate, average and export :func:`crsam_jax.eval_params`. The transformation is the whole optimizer, and what
    changes its updates afterwards breaks the shift: clipping and the like go before it in a chain, or into
    ``base_optimizer``, which is called at w (weight decay shrinks w) and must not evaluate the loss itself.

    Where ∇L(w̃) is not finite, the base optimizer's state, m and the count stay as they are and the shift is undone, so
    that the next gradient is that at w. It is that, too, after m came out zero or overflowed, or where a schedule's ρ
    is negative or not finite. All of these are counted in ``guarded_steps``.

    Args:
      base_optimizer: any optax optimizer, with its learning rate.
      rho: ρ ≥ 0, a number or a schedule: ρ(t) is the radius at which the t-th gradient is taken, from t = 0. Under
        ``optax.inject_hyperparams`` the value at one update sets the shift for the next gradient.
      decay: μ in [0, 1), the base optimizer's momentum in the paper: ``momentum`` of SGD, ``b1`` of Adam. m is
        kept apart from the base optimizer's, at the cost of one vector, so that any base optimizer will do.
      mask: which part of the params to perturb: a prefix of params with bool leaves, or a function from params to one
        (declare that static under ``optax.inject_hyperparams``). The norm runs over that part.

    Returns:
      A transformation from the gradient at the shifted params to the updates that lead to the next shifted params,
      structure and dtypes of the gradient. It needs no loss, only ``params``.

    Raises:
      TypeError: if ``base_optimizer`` is no transformation or a number is none; at ``update``, if a leaf is complex or
        integer.
      ValueError: if a number is out of range; at ``update``, if params is None or the gradient does not fit it.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import eval_params, msam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = msam(optax.sgd(0.5), rho=1.0)
      >>> params = jnp.array([0.0, 8.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(state, params))  # w = [0, 4], shifted by −m/‖m‖
      [0. 3.] [0. 4.]

    References:
      Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", arXiv
      2401.12033, algorithm 1. The authors' code adds SGD's weight decay at w̃. ρ = 0.3 is its default; its commands
      train with ρ = 3.
    """
    check_number("decay", decay, below=1)
    return shifted("msam", base_optimizer, rho, decay, -1.0, mask)


def s2sam(
    base_optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""S²-SAM: the gradient at :math:`w_t + \rho\, g_{t-1}/\|g_{t-1}\|`, one evaluation a step.

    SAM with the ascent direction of the step before: :math:`g_t = \nabla L(w_t + \rho\, g_{t-1}/\|g_{t-1}\|)` with
    :math:`g_{-1} = 0`, and the base optimizer's step with g_t from w_t.

    What :func:`crsam_jax.msam` says of shifted params, :func:`crsam_jax.eval_params` and guards holds here too.

    Args:
      base_optimizer: any optax optimizer, with its learning rate.
      rho: ρ ≥ 0, a number or schedule.
      mask: which part of the params to perturb.

    Returns:
      A transformation from the gradient at the shifted params to the updates that lead to the next shifted params.

    Raises:
      TypeError, ValueError: as :func:`crsam_jax.msam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import eval_params, s2sam
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> tx = s2sam(optax.sgd(0.5), rho=1.0)
      >>> params = jnp.array([0.0, 8.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, eval_params(state, params))  # w = [0, 4], shifted by g/‖g‖
      [0. 5.] [0. 4.]

    References:
      Ji et al., "A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse
      Training", NeurIPS 2024.
    """
    return shifted("s2sam", base_optimizer, rho, None, 1.0, mask)


def eval_params(opt_state: Any, params: Params) -> Params:
    """The params w without the shift, to evaluate, average and export.

    Args:
      opt_state: an optimizer state with the state of msam or s2sam anywhere in it; an ``nnx.Optimizer``'s too.
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
    rho: optax.ScalarOrSchedule,
    decay: Scalar | None,
    sign: float,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """The base optimizer on params shifted by e = sign · ρ m/‖m‖, with m ← decay · m + g; ``None``: m is the latest g.

    Raises:
      TypeError, ValueError: for bad arguments; the message names ``name``.
    """
    if not isinstance(base_optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{name} wraps a base optimizer, such as optax.sgd(0.1, momentum=0.9), and needs no loss_fn; "
            f"got {base_optimizer!r}."
        )
    check_hyperparameter("rho", rho)
    check_mask("mask", mask)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Params) -> OneEvaluationState:
        check_leaves(_shown(params))
        dtype = trees.wide_dtype(params)
        memory_dtype = None if decay is None else dtype
        return OneEvaluationState(
            step_count=jnp.zeros((), jnp.int32),
            memory=jax.tree.map(lambda p: jnp.zeros_like(p, memory_dtype), params),
            shift=Shift(*(jnp.zeros((), dtype) for _ in Shift._fields)),
            diagnostics=initial(OneEvaluationDiagnostics, params),
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

        count = jnp.where(is_finite, optax.safe_increment(state.step_count), state.step_count)
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
            step_count=count,
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
    return masked(grads, perturbed_part(mask, params))


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
    """The perturbation in the nodes of params; an nnx.Optimizer's state holds variables of another kind."""
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
