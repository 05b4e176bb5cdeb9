"""A set-up tried out on the user's own params and batch: what is wrong with it, in words."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crsam_jax import _trees as trees
from crsam_jax._loss import LossBinder, LossFn, checked_loss
from crsam_jax._trees import Params, check_gradient
from crsam_jax.diagnostics import AscentOnlyDiagnostics, RandomProbesDiagnostics, TwoSidedDiagnostics
from crsam_jax.engine import SharpnessAwareState
from crsam_jax.shifted import OneEvaluationState

_TOLERANCE = 1e-3
"""What two programs for one number may differ by, if compiling loss_fn changes it less."""

_LARGEST_TOLERANCE = 0.02
"""What they may differ by at most: the user's program may compute in half precision, fused otherwise."""

_ROUNDINGS = 10
"""How many times as far as loss_fn and the compiled loss_fn two programs for one number may be apart."""

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
    has_aux: bool | None = None,
    **kwargs: Any,
) -> None:
    """Tries an optimizer out for two steps, and says what is wrong; to be called once, outside of ``jit``.

    It finds a gradient or loss that does not belong to ``loss_fn``, a method that was built with another loss (label
    smoothing in one of the two, say), a loss that is not the same twice or is rounded to half precision, a
    transformation before the method that changes the gradient (clipping, weight decay, a mean over steps), a second
    method, an ``optax.MultiSteps`` around it, a policy around a whole chain, a step that fell back on g, a loss whose
    gradient is not its derivative, and a chain that goes uphill; of ``msam`` and ``s2sam``, a wrong gradient or loss
    and a transformation behind them. If all is well it prints what it checked. A few evaluations; nothing is changed.
    There is no axis here: a set-up with ``axis_name`` is checked without it.

    Args:
      tx: a method, a policy around it, or a whole chain.
      loss_fn: the loss that ``tx`` was built with.
      params: the parameters, as ``init`` got them.
      grads: the gradient as your own step computes it, averaged over devices if it is there; ``None``: not checked,
        as with ``ascent_only=True``, where it comes from a part of the batch.
      loss: L(w) as your own step computes it; ``None``: not checked.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``; ``None``: found out by a call.
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
      >>> crsam_jax.check_setup(tx, loss_fn, w, grads=grads, loss=loss, batch=batch)
      This set-up is right, as far as one batch can tell:
      - loss_fn returns 1 for these arguments, twice
      - loss= is that loss
      - grads are its gradient, of norm 5
      - the method has the same loss and gets this gradient unchanged, also in a second step at other params
      - the step did not fall back
      - the updates point downhill
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
    if has_aux is None:
        has_aux = _has_aux(loss_fn, params, kwargs)
    bound = LossBinder(loss_fn, has_aux, call="check_setup(tx, loss_fn, params, {})")(kwargs)
    here = _Point.of(bound, params)
    tolerance = _tolerance_of(bound, here)
    seen: list[str] = []
    found = [
        *_of_loss(here, bound(params), checked_loss(loss), tolerance, seen),
        *([] if grads is None else _of_gradient(grads, here.grads, tolerance, seen)),
        *_of_step(tx, here, _Point.of(bound, _elsewhere(params)), tolerance, kwargs, seen),
    ]
    if found:
        raise ValueError("\n- ".join(["This set-up is wrong:", *found]))
    if grads is None:
        seen.append("not checked, as grads= was not given: the gradient of your own step")
    if loss is None:
        seen.append("not checked, as loss= was not given: the loss of your own step")
    print("\n- ".join(["This set-up is right, as far as one batch can tell:", *seen]))


class _Point(NamedTuple):
    """Params, and the loss and gradient there."""

    params: Params
    loss: jax.Array
    grads: Params

    @classmethod
    def of(cls, bound: Callable[[Params], jax.Array], params: Params) -> "_Point":
        return cls(params, *jax.value_and_grad(bound)(params))


def _has_aux(loss_fn: LossFn, params: Params, kwargs: dict[str, Any]) -> bool:
    """Whether ``loss_fn`` returns a pair."""
    binder = LossBinder(loss_fn, has_aux=False, call="check_setup(tx, loss_fn, params, {})")
    result = jax.eval_shape(lambda w: loss_fn(w, **binder.arguments(kwargs)), params)
    return isinstance(result, tuple) and len(result) == 2


def _tolerance_of(bound: Callable[[Params], jax.Array], here: _Point) -> float:
    """What two programs for one loss or gradient may differ by on this machine, relative to it."""
    compiled = _Point(here.params, *jax.jit(jax.value_and_grad(bound))(here.params))
    noise = trees.wide_map(lambda a, b: a - b, compiled.grads, here.grads)
    apart = [float(trees.norm(noise) / trees.norm(here.grads)), float(jnp.abs(compiled.loss / here.loss - 1))]
    measured = _ROUNDINGS * max([0.0, *(value for value in apart if value < 1)])  # leaves NaN out
    return min(max(_TOLERANCE, measured, 4 * float(jnp.finfo(here.loss.dtype).eps)), _LARGEST_TOLERANCE)


def _elsewhere(params: Params) -> Params:
    """Other params of the same size, where two losses differ that are equal at an initialization."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))

    def moved(leaf: Any, key: jax.Array) -> jax.Array:
        wide = jnp.asarray(leaf, trees.wide_dtype(leaf))
        size = jnp.sqrt(jnp.mean(wide**2))
        noise = jax.random.normal(key, wide.shape, wide.dtype)
        return (wide + jnp.where(size > 0, size, 0.1) * noise).astype(jnp.asarray(leaf).dtype)

    return jax.tree.unflatten(structure, [moved(leaf, key) for leaf, key in zip(leaves, keys, strict=False)])


def _of_loss(here: _Point, again: jax.Array, given: Any, tolerance: float, seen: list[str]) -> Iterator[str]:
    value = here.loss
    if jnp.abs(again - value) > max(_SAME_PROGRAM, 2 * float(jnp.finfo(value.dtype).eps)) * jnp.abs(value):
        yield (
            f"loss_fn returned {value:.9g} and then {again:.9g} for the same arguments: it must be a function of them "
            "alone. Pass random keys and model state as arguments."
        )
        return
    seen.append(f"loss_fn returns {value:.4g} for these arguments, twice")
    if given is None:
        return
    if not _is_close(given, value, tolerance):
        yield (
            f"loss= is {given:g}, but loss_fn returns {value:g} for these arguments: another batch, another key of the "
            "dropout, another model state, a weight decay or label smoothing in one of them, or a sum for a mean?"
        )
    else:
        seen.append("loss= is that loss")


def _of_gradient(grads: Params, expected: Params, tolerance: float, seen: list[str]) -> Iterator[str]:
    check_gradient(grads, expected)
    size = trees.norm(expected)
    if trees.norm(trees.wide_map(lambda g, right: g - right, grads, expected)) <= tolerance * size:
        seen.append(f"grads are its gradient, of norm {size:.4g}")
        return
    ratio, cosine = trees.norm(grads) / size, trees.cosine(grads, expected)
    scale = ratio * cosine  # of the part of grads along the gradient
    across = trees.norm(trees.wide_map(lambda g, right: g - scale * right, grads, expected)) / size
    is_along = bool((ratio > 0) & (across <= max(tolerance, 0.01) * ratio))
    advice = "Pass the gradient of loss_fn, at the same params and with the same arguments, with nothing applied to it."
    if is_along and scale < 0:
        yield (
            f"grads point against the gradient of loss_fn, {ratio:.3g} times as long: they look like an optimizer's "
            f"updates. {advice}"
        )
    elif is_along and abs(scale - 1) > across:
        yield (
            f"grads are {ratio:.4g} times the gradient of loss_fn: summed over devices or examples and not averaged, "
            f"clipped, or of a scaled or smoothed loss. {advice}"
        )
    else:
        yield (
            f"grads are not the gradient of loss_fn: the cosine between them is {cosine:.3g}, the ratio of their "
            f"norms {ratio:.3g}. They may belong to another batch, another key of the dropout, another model state "
            f"(it must be that before the pass), of a loss with label smoothing or without, or have weight decay or "
            f"momentum in them. {advice}"
        )


def _of_step(
    tx: Any, here: _Point, elsewhere: _Point, tolerance: float, kwargs: dict[str, Any], seen: list[str]
) -> Iterator[str]:
    before = tx.init(here.params)
    methods = _methods(before)
    if _nodes(before, OneEvaluationState):
        if _is_chain(before) and not isinstance(jax.tree.leaves(before, is_leaf=_is_shifted)[-1], OneEvaluationState):
            yield (
                "A transformation stands behind msam or s2sam, whose updates hold the shift of the params too and must "
                "not be changed. They are the whole optimizer: put it before them, or into the optimizer they wrap."
            )
        else:
            seen.append("nothing stands behind msam or s2sam")
        return
    if not methods:
        yield "tx holds no sharpness-aware method: its state has no SharpnessAwareState."
        return
    if len(methods) > 1:
        yield (
            f"tx holds {len(methods)} sharpness-aware methods, one behind the other: all but the first would take a "
            "method's result for the gradient of the loss. Keep one of them."
        )
        return
    if any(_methods(node.inner_opt_state) for node in _nodes(before, optax.MultiStepsState)):
        yield (
            "optax.MultiSteps stands around the method: its mean gradient would meet the perturbed points of the last "
            "part alone. Write optax.chain(method, optax.MultiSteps(base, k).gradient_transformation())."
        )
        return
    update, has_policy = optax.with_extra_args_support(tx).update, _has_policy(before)
    # Only a policy takes ``full_step``; for all others it would be an unknown argument.
    choice = {"full_step": True} if has_policy else {}
    if jax.tree.leaves(methods[0].ascent):  # the first step of some ascents has no direction yet
        _, before = update(elsewhere.grads, before, elsewhere.params, **kwargs, **choice)
    updates, after = update(here.grads, before, here.params, **kwargs, **choice)
    wrong = list(_of_step_here(_methods(before)[0], _methods(after)[0], here, tolerance))
    if not wrong:
        _, later = update(elsewhere.grads, after, elsewhere.params, **kwargs, **choice)
        wrong = list(_of_second_step(_methods(later)[0], here, elsewhere, tolerance))
    yield from wrong
    if not wrong:
        seen.append(
            "the method has the same loss and gets this gradient unchanged, also in a second step at other params"
        )
        seen.append("the step did not fall back")
    is_uphill = trees.dot(updates, here.grads) > 0
    if has_policy:
        plain, _ = update(here.grads, before, here.params, **kwargs, full_step=False)
        if not is_uphill and trees.dot(plain, here.grads) > 0:
            yield (
                "The updates point uphill between the full steps: a policy stands around a whole chain, and there it "
                "returns the gradient itself. Wrap the method alone: optax.chain(periodic(method, 2), optimizer)."
            )
    if not is_uphill:
        seen.append("the updates point downhill")
    elif _is_chain(after):
        yield (
            "The updates point uphill: nothing behind the method turns its gradient into a step downhill, or it is "
            "done twice. End the chain with an optimizer, such as optax.sgd(learning_rate)."
        )
    else:
        seen.append(
            "tx is a method alone, which returns a gradient: put an optimizer behind it, optax.chain(tx, optimizer)"
        )


def _of_step_here(
    before: SharpnessAwareState, method: SharpnessAwareState, here: _Point, tolerance: float
) -> Iterator[str]:
    """What is wrong in a step, from the method's state before and after it."""
    earlier: Any = before.diagnostics
    seen: Any = method.diagnostics
    grad_norm = trees.norm(here.grads)
    if method.step_count == before.step_count:
        yield "The method was not called in a step: a transformation around it skips steps or holds them back."
        return
    is_whole = not isinstance(seen, AscentOnlyDiagnostics)
    if is_whole and not _is_close(seen.loss, here.loss, tolerance):
        yield f"tx was built with another loss: its own is {seen.loss:g} where loss_fn returns {here.loss:g}."
    if abs(seen.grad_norm - grad_norm) > _SAME * grad_norm:
        yield (
            f"The gradient's norm is {grad_norm:.3g} where it enters the chain and {seen.grad_norm:.3g} where it "
            "reaches the method: a transformation before it (clipping, weight decay, an optimizer) changes it. "
            "Put the method first."
        )
    elif is_whole and seen.mismatched_steps > earlier.mismatched_steps:
        yield (
            "The gradient that reaches the method does not fit the losses that it sees: a transformation before it "
            "turns the gradient, or loss_fn has a derivative of its own making (custom_vjp, stop_gradient), or rho is "
            "so large that the loss is far from smooth over it."
        )
    if seen.guarded_steps > earlier.guarded_steps:
        yield (
            "The step fell back: the gradient is zero or not finite, or a mask leaves nothing to perturb, or a loss or "
            "gradient at distance rho is not finite, or the penalty's logarithm is not defined there."
        )


def _of_second_step(method: SharpnessAwareState, here: _Point, elsewhere: _Point, tolerance: float) -> Iterator[str]:
    """What one step at an initialization cannot show."""
    seen: Any = method.diagnostics
    grad_norm = trees.norm(elsewhere.grads)
    if not (jnp.isfinite(elsewhere.loss) and jnp.isfinite(grad_norm)):
        return
    if abs(seen.grad_norm - grad_norm) > _SAME * grad_norm:
        yield (
            f"In a second step the gradient's norm is {grad_norm:.3g} where it enters the chain and "
            f"{seen.grad_norm:.3g} where it reaches the method: a transformation before it (a mean over steps, "
            "momentum, an optimizer) changes it. Put the method first."
        )
    if not isinstance(seen, AscentOnlyDiagnostics) and not _is_close(seen.loss, elsewhere.loss, tolerance):
        yield (
            f"tx was built with another loss: away from these params its own is {seen.loss:g} where loss_fn returns "
            f"{elsewhere.loss:g}. Label smoothing or weight decay in one of them?"
        )
    if isinstance(seen, (TwoSidedDiagnostics, RandomProbesDiagnostics)):
        for half in (jnp.bfloat16, jnp.float16):
            if all(_is_rounded(point.loss, half) for point in (here, elsewhere)):
                yield (
                    f"loss_fn returns losses that are rounded to {jnp.dtype(half).name}, and the second difference of "
                    "such losses is noise. Compute the loss in float32: logits.astype(jnp.float32) before it."
                )
                return


def _is_rounded(loss: jax.Array, half: Any) -> bool:
    """Whether the loss has no digits beyond those of a half precision."""
    return bool((loss != 0) & (loss.astype(half).astype(loss.dtype) == loss))


def _is_close(found: Any, expected: Any, tolerance: float) -> bool:
    return bool(jnp.abs(found - expected) <= tolerance * jnp.abs(expected))


def _nodes(state: Any, kind: Any) -> list[Any]:
    """All nodes of a type anywhere in the state; nodes inside such a node are not searched."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]


def _methods(state: Any) -> list[Any]:
    return _nodes(state, SharpnessAwareState)


def _is_shifted(state: Any) -> bool:
    """Whether it is the state of msam or s2sam; states without numbers, of clipping for instance, stay nodes too."""
    return isinstance(state, OneEvaluationState) or (isinstance(state, tuple) and not state)


def _is_policy(state: Any) -> bool:
    return hasattr(state, "is_due")


def _has_policy(state: Any) -> bool:
    return any(map(_is_policy, jax.tree.leaves(state, is_leaf=_is_policy)))


def _is_chain(state: Any) -> bool:
    """Whether it is the state of an optax chain: a method alone, or a wrapper of it, returns a gradient."""
    return type(state) in (tuple, dict)
