"""A set-up tried out on the user's own params and batch: what is wrong with it, in words."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._loss import LossBinder, LossFn, checked_loss
from crsam_jax._trees import Params, check_gradient
from crsam_jax.diagnostics import AscentOnlyDiagnostics
from crsam_jax.engine import SharpnessAwareState
from crsam_jax.shifted import OneEvaluationState

_TOLERANCE = 0.02
"""What two programs for one number may differ by: that of the user may compute in half precision, fused otherwise."""

_SAME = 1e-4
"""What two norms of one gradient may differ by."""

_SAME_PROGRAM = 1e-5
"""What one program may differ by from run to run, where sums have no fixed order; in half precision, two roundings."""


def check_setup(
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    params: Params,
    *,
    grads: Params = None,
    loss: Any = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> None:
    """Tries an optimizer out for one step, and says what is wrong; to be called once, outside of ``jit``.

    It finds a gradient or loss that is not that of ``loss_fn``, a loss that is not the same twice, a transformation
    before the method that changes the gradient, a second method, an ``optax.MultiSteps`` around it, a policy around a
    whole chain, a step that fell back on g, a loss whose gradient is not its derivative, and a chain that goes uphill;
    of ``msam`` and ``s2sam``, the first two, and a transformation behind them. A few evaluations; nothing is changed.
    There is no axis here: a set-up with ``axis_name`` is checked without it.

    Args:
      tx: what a member of the family returned, a policy around it, or a whole chain.
      loss_fn: the loss that ``tx`` was built with.
      params: the parameters, as ``init`` got them.
      grads: the gradient as your own step computes it, averaged over devices if it is there; ``None``: not checked,
        as with ``ascent_only=True``, where it is that of a part of the batch.
      loss: L(w) as your own step computes it; ``None``: not checked.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      **kwargs: what ``update`` gets by name: batch, rng, model state.

    Raises:
      ValueError: listing all that is wrong.
      TypeError: where ``update`` raises it, for instance if an argument of ``loss_fn`` is missing; and under ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, crsam_jax
      >>> loss_fn = lambda w, batch: jnp.mean((batch @ w - 1.0) ** 2)
      >>> w, batch = jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 1.0]])
      >>> loss, grads = jax.value_and_grad(loss_fn)(w, batch)
      >>> tx = optax.chain(crsam_jax.crsam(loss_fn), optax.sgd(0.1))
      >>> crsam_jax.check_setup(tx, loss_fn, w, grads=grads, loss=loss, batch=batch)  # all is well
      >>> wrong = optax.chain(optax.clip_by_global_norm(1.0), crsam_jax.crsam(loss_fn), optax.sgd(0.1))
      >>> try:
      ...   crsam_jax.check_setup(wrong, loss_fn, w, batch=batch)
      ... except ValueError as error:
      ...   print(str(error).splitlines()[1])
      - The gradient's norm is 5 where it enters the chain and 1 where it reaches the method: a transformation before \
it (clipping, weight decay, an optimizer) changes it. Put the method first.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, grads, loss, kwargs))):
        raise TypeError("check_setup looks at numbers, which are not known under jit: call it outside, once.")
    bound = LossBinder(loss_fn, has_aux, call="check_setup(tx, loss_fn, params, {})")(kwargs)
    value, expected = jax.value_and_grad(bound)(params)
    again, _ = jax.value_and_grad(bound)(params)
    found = [
        *_of_loss(value, again, checked_loss(loss)),
        *([] if grads is None else _of_gradient(grads, expected)),
        *_of_step(tx, params, value, expected, kwargs),
    ]
    if found:
        raise ValueError("\n- ".join(["This set-up is wrong:", *found]))


def _of_loss(value: jax.Array, again: jax.Array, given: Any) -> Iterator[str]:
    if jnp.abs(again - value) > max(_SAME_PROGRAM, 2 * float(jnp.finfo(value.dtype).eps)) * jnp.abs(value):
        yield (
            f"loss_fn returned {value:.9g} and then {again:.9g} for the same arguments: it must be a function of them "
            "alone. Pass random keys and model state as arguments."
        )
    elif given is not None and not _is_close(given, value):
        yield (
            f"loss= is {given:g}, but loss_fn returns {value:g} for these arguments: another batch, another key of the "
            "dropout, another model state, a weight decay in one of them, or a sum for a mean?"
        )


def _of_gradient(grads: Params, expected: Params) -> Iterator[str]:
    check_gradient(grads, expected)
    rest = trees.wide_map(lambda g, right: g - right, grads, expected)
    if trees.norm(rest) <= _TOLERANCE * trees.norm(expected):
        return
    ratio, cosine = trees.norm(grads) / trees.norm(expected), trees.cosine(grads, expected)
    advice = "Pass the gradient of loss_fn, at the same params and with the same arguments, with nothing applied to it."
    if cosine < -1 + _TOLERANCE**2:
        yield (
            f"grads point against the gradient of loss_fn, {ratio:.3g} times as long: they look like an optimizer's "
            f"updates. {advice}"
        )
    elif cosine < 1 - _TOLERANCE**2:
        yield (
            f"grads are not the gradient of loss_fn: the cosine between them is {cosine:.3g}, the ratio of their "
            f"norms {ratio:.3g}. They may be those of another batch, another key of the dropout, another model state "
            f"(it must be that before the pass), or have weight decay or momentum in them. {advice}"
        )
    else:
        yield (
            f"grads are {ratio:.3g} times the gradient of loss_fn: summed over devices or examples and not averaged, "
            f"clipped, or of a scaled loss. {advice}"
        )


def _of_step(tx: Any, params: Params, value: jax.Array, grads: Params, kwargs: dict[str, Any]) -> Iterator[str]:
    before = tx.init(params)
    members = _members(before)
    if _nodes(before, OneEvaluationState):
        if _is_chain(before) and not isinstance(jax.tree.leaves(before, is_leaf=_is_shifted)[-1], OneEvaluationState):
            yield (
                "A transformation stands behind msam or s2sam, whose updates hold the shift of the params too and must "
                "not be changed. They are the whole optimizer: put it before them, or into the optimizer they wrap."
            )
        return
    if not members:
        yield "tx holds no sharpness-aware method: its state has no SharpnessAwareState."
        return
    if len(members) > 1:
        yield (
            f"tx holds {len(members)} sharpness-aware methods, one behind the other: all but the first would take a "
            "method's result for the gradient of the loss. Keep one of them."
        )
        return
    if any(_members(node.inner_opt_state) for node in _nodes(before, optax.MultiStepsState)):
        yield (
            "optax.MultiSteps stands around the method: its mean gradient would meet the probes of the last part "
            "alone. Write optax.chain(method, optax.MultiSteps(base, k).gradient_transformation())."
        )
        return
    update, has_policy = optax.with_extra_args_support(tx).update, _has_policy(before)
    # Only a policy takes ``full_step``; for all others it would be an unknown argument.
    choice = {"full_step": True} if has_policy else {}
    updates, after = update(grads, before, params, **kwargs, **choice)
    yield from _of_member(_members(after)[0], value, trees.norm(grads))
    is_uphill = trees.dot(updates, grads) > 0
    if has_policy:
        plain, _ = update(grads, before, params, **kwargs, full_step=False)
        if not is_uphill and trees.dot(plain, grads) > 0:
            yield (
                "The updates point uphill between the full steps: a policy stands around a whole chain, and there it "
                "returns the gradient itself. Wrap the method alone: optax.chain(periodic(method, 2), optimizer)."
            )
    if _is_chain(after) and is_uphill:
        yield (
            "The updates point uphill: nothing behind the method turns its gradient into a step downhill, or it is "
            "done twice. End the chain with an optimizer, such as optax.sgd(learning_rate)."
        )


def _of_member(member: SharpnessAwareState, value: jax.Array, grad_norm: jax.Array) -> Iterator[str]:
    seen: Any = member.diagnostics
    if member.step_count == 0:
        yield "The method was not called in a step: a transformation around it skips steps or holds them back."
        return
    is_whole = not isinstance(seen, AscentOnlyDiagnostics)
    if is_whole and not _is_close(seen.loss, value):
        yield f"tx was built with another loss: its own is {seen.loss:g} where loss_fn returns {value:g}."
    if abs(seen.grad_norm - grad_norm) > _SAME * grad_norm:
        yield (
            f"The gradient's norm is {grad_norm:.3g} where it enters the chain and {seen.grad_norm:.3g} where it "
            "reaches the method: a transformation before it (clipping, weight decay, an optimizer) changes it. "
            "Put the method first."
        )
    elif is_whole and seen.mismatched_steps:
        yield (
            "The gradient that reaches the method does not fit the losses that it sees: a transformation before it "
            "turns the gradient, or loss_fn has a derivative of its own making (custom_vjp, stop_gradient), or rho is "
            "so large that the loss is far from smooth over it."
        )
    if seen.guarded_steps:
        yield (
            "The step fell back: the gradient is zero or not finite, or a mask leaves nothing to perturb, or a loss or "
            "gradient at distance rho is not finite, or the penalty's logarithm is not defined there."
        )


def _is_close(found: Any, expected: Any) -> bool:
    return bool(jnp.abs(found - expected) <= _TOLERANCE * jnp.abs(expected))


def _nodes(state: Any, kind: Any) -> list[Any]:
    """All nodes of a type anywhere in the state; nodes inside such a node are not searched."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _members(state: Any) -> list[Any]:
    return _nodes(state, SharpnessAwareState)


def _is_shifted(state: Any) -> bool:
    """Whether it is the state of msam or s2sam; states without numbers, of clipping for instance, stay nodes too."""
    return isinstance(state, OneEvaluationState) or (isinstance(state, tuple) and not state)


def _is_policy(state: Any) -> bool:
    return hasattr(state, "is_due")


def _has_policy(state: Any) -> bool:
    return any(map(_is_policy, jax.tree.leaves(state, is_leaf=_is_policy)))


def _is_chain(state: Any) -> bool:
    """Whether it is the state of an optax chain: a member alone, or a wrapper of it, returns a gradient."""
    return type(state) in (tuple, dict)
