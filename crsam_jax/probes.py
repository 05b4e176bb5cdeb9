"""What is there: losses and gradients at the perturbed points, w + ρv and w − ρv.

The points are independent of each other, so they can be evaluated in three ways, with the same numbers up
to rounding:

* ``"vmap"``: all points in one batched evaluation. Made for GPUs and TPUs, which one small batch leaves idle.
* ``"sequential"``: one plain evaluation a point. The compiler is free to overlap them.
* ``"ordered"``: as sequential, but each evaluation waits for the one before it, so that only one set of
  activations is alive at a time: SAM's memory for a little less speed.

``"auto"`` is vmap on GPU and TPU and sequential on CPU, decided when the program is lowered for a platform.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crsam_jax import _tree

EVALUATIONS = ("auto", "vmap", "sequential", "ordered")

Loss = Callable[[Any], jax.Array]


class Evaluation(NamedTuple):
    """The loss, a scalar in the dtype that the loss has, and its gradient, a tree like params."""

    loss: jax.Array
    grads: Any


def evaluate_loss(loss: Loss, params: Any, axis_name: str | None) -> jax.Array:
    """L(w) alone; under jit XLA merges it with the caller's own forward pass at w."""
    if axis_name is None:
        return loss(params)
    return jax.lax.pmean(loss(varying(params, axis_name)), axis_name)


def evaluate(loss: Loss, points: Sequence[Any], evaluation: str, axis_name: str | None) -> list[Evaluation]:
    """Losses and gradients at each of ``points``, averaged over the mesh axis ``axis_name`` if there is one."""
    if axis_name is not None:
        points = [varying(point, axis_name) for point in points]
    evaluations = _evaluate_here(jax.value_and_grad(loss), points, evaluation)
    if axis_name is not None:
        evaluations = jax.lax.pmean(evaluations, axis_name)
    return evaluations


def synced(tree: Any, axis_name: str) -> Any:
    """The mean of each floating leaf over the axis; a flag that is set anywhere is set; integers are alike already."""

    def sync(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.lax.pmean(leaf, axis_name)
        return jax.lax.pmax(leaf.astype(jnp.int32), axis_name).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: sync(jnp.asarray(leaf)), tree)


def perturb(params: Any, direction: Any, length: jax.Array) -> Any:
    """The point w + length · v, summed in at least float32 and rounded to the dtypes of params."""
    moved = _tree.wide_map(lambda w, v: w + length.astype(w.dtype) * v.astype(w.dtype), params, direction)
    return _tree.cast_like(moved, params)


def _evaluate_here(value_and_grad: Callable[[Any], Any], points: Sequence[Any], evaluation: str) -> list[Evaluation]:
    def vmapped(*points: Any) -> list[Evaluation]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
        together = Evaluation(*jax.vmap(value_and_grad, axis_size=len(points))(stacked))
        return [jax.tree.map(operator.itemgetter(i), together) for i in range(len(points))]

    def sequential(*points: Any) -> list[Evaluation]:
        return [Evaluation(*value_and_grad(point)) for point in points]

    def ordered(*points: Any) -> list[Evaluation]:
        evaluations = [Evaluation(*value_and_grad(points[0]))]
        for point in points[1:]:
            evaluations.append(Evaluation(*value_and_grad(_after(evaluations[-1].grads, point))))
        return evaluations

    if len(points) == 1:  # nothing to batch or to order
        return sequential(*points)
    match evaluation:
        case "vmap":
            return vmapped(*points)
        case "sequential":
            return sequential(*points)
        case "ordered":
            return ordered(*points)
        case _:
            return jax.lax.platform_dependent(*points, cpu=sequential, default=vmapped)


def _after(first: Any, then: Any) -> Any:
    """``then``, unchanged, but not available before all of ``first`` is.

    XLA looks through optimization barriers on CPU, so the dependence has to be one of data. No maximum of
    absolute values is −1, which the compiler does not know (it does know that none is below 0).
    """
    never = _tree.max_abs(first) == -1
    return jax.tree.map(lambda leaf: jnp.where(never, jnp.zeros_like(leaf), leaf), then)


def varying(params: Any, axis_name: str) -> Any:
    """Params marked as differing along the axis, so that their gradients are not summed over it.

    Inside ``shard_map(check_vma=True)`` the gradient with respect to a replicated value is the sum over the
    axis already; without the check, and under ``pmap`` and ``vmap``, it is local and there is nothing to mark.
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:  # an axis of vmap
        return params

    def cast(leaf: jax.Array) -> jax.Array:
        kind: Any = jax.typeof(leaf)
        varying = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # renamed during jax 0.10
        if axis_name in varying:
            return leaf
        return jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(cast, params)
