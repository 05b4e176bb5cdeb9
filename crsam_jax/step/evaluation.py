"""Losses and gradients at the points of a step, evaluated in the order that :class:`crsam_jax.Execution` says."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax.step import trees
from crsam_jax.step.axes import varying
from crsam_jax.step.execution import Execution
from crsam_jax.step.shared_out import shared_out
from crsam_jax.step.types import Evaluation, Loss, Params, Strategy, ValueAndGrad


def perturb(params: Params, direction: Params, length: jax.Array) -> Params:
    """The point w + length · v, summed in at least float32 and rounded to the dtypes of params."""
    moved = trees.wide_map(lambda w, v: w + length.astype(w.dtype) * v.astype(w.dtype), params, direction)
    return trees.cast_like(moved, params)


def loss_at(loss: Loss, params: Params, given: Any, axis_name: str | None) -> jax.Array:
    """The loss L(w): the caller's, or evaluated; under jit XLA mostly merges that with the caller's forward pass."""
    value = loss(varying(params, axis_name)) if given is None else varying(given, axis_name)
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


def evaluate(loss: Loss, points: Sequence[Params], execution: Execution) -> list[Evaluation]:
    """Losses and gradients at each of ``points``, averaged over the averaging axis if there is one."""
    axis_name = execution.averaging_axis
    points = [varying(point, axis_name) for point in points]
    value_and_grad = jax.value_and_grad(loss)
    if execution.probe_axis is None or len(points) == 1:  # a single point cannot be divided among devices
        evaluations = _evaluate(value_and_grad, points, execution.strategy)
    else:
        evaluations = shared_out(value_and_grad, points, execution.probe_axis)
    return evaluations if axis_name is None else jax.lax.pmean(evaluations, axis_name)


def _evaluate(value_and_grad: ValueAndGrad, points: Sequence[Params], strategy: Strategy) -> list[Evaluation]:
    if len(points) == 1:  # a single point needs neither batching nor an order
        return _sequential(value_and_grad, points)
    match strategy:
        case "vmap":
            return _vmapped(value_and_grad, points)
        case "sequential":
            return _sequential(value_and_grad, points)
    return _ordered(value_and_grad, points)


def _vmapped(value_and_grad: ValueAndGrad, points: Sequence[Params]) -> list[Evaluation]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    together = Evaluation(*jax.vmap(value_and_grad, axis_size=len(points))(stacked))
    return [jax.tree.map(operator.itemgetter(i), together) for i in range(len(points))]


def _sequential(value_and_grad: ValueAndGrad, points: Sequence[Params]) -> list[Evaluation]:
    return [Evaluation(*value_and_grad(point)) for point in points]


def _ordered(value_and_grad: ValueAndGrad, points: Sequence[Params]) -> list[Evaluation]:
    evaluations = [Evaluation(*value_and_grad(points[0]))]
    for point in points[1:]:
        evaluations[-1], point = jax.lax.platform_dependent(evaluations[-1], point, cpu=_after, default=_after_barrier)
        evaluations.append(Evaluation(*value_and_grad(point)))
    return evaluations


def _after_barrier(first: Any, then: Params) -> tuple[Any, Params]:
    """Both unchanged, ``then`` not available before ``first`` is: so far as the compiler respects barriers."""
    barred: tuple[Any, Params] = jax.lax.optimization_barrier((first, then))
    return barred


def _after(first: Any, then: Params) -> tuple[Any, Params]:
    """The same for CPU, where XLA ignores barriers: there ``then`` is made to depend on the data of ``first``.

    One number from each leaf of ``first`` has to be there. No maximum of absolute values is −1, which the compiler does
    not know (it does know that none is below 0).
    """
    elements = [_element(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(first)]
    never = jnp.max(jnp.abs(jnp.concatenate(elements)), initial=0) == -1
    return first, jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), then)


def _element(leaf: jax.Array) -> jax.Array:
    """A vector of one number from the leaf: its sum if explicit mesh axes divide it, which cannot be sliced."""
    return jnp.sum(leaf)[None] if trees.is_sharded(leaf) else jnp.ravel(leaf)[:1]
