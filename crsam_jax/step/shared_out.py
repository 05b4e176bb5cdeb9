"""The points of a step shared out among the devices of a mesh axis: the paper's parallel evaluation of both sides."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from crsam_jax.step.axes import gathered, is_mapped
from crsam_jax.step.types import Evaluation, Params, ValueAndGrad


def shared_out(value_and_grad: ValueAndGrad, points: Sequence[Params], axis: str) -> list[Evaluation]:
    """Losses and gradients at all points, each evaluated by the devices at one place of the axis.

    With as many places as points each device evaluates once; with fewer, in rounds.

    Raises:
      ValueError: if the axis is neither one of the mesh in context nor mapped over already.
    """
    if is_mapped(axis):
        return _evaluations(value_and_grad, points, axis)
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"probe_axis={axis!r} is no axis of the mesh in context, which has {mesh.axis_names or 'none'}. Under jit "
            "call the step inside `with jax.set_mesh(mesh):` with a mesh that has it."
        )
    # Manual along this axis alone: along the others the compiler goes on dividing the batch as it does outside.
    replicated = PartitionSpec()
    evaluate: Any = jax.shard_map(
        lambda points: _evaluations(value_and_grad, points, axis),
        in_specs=(replicated,), out_specs=replicated, axis_names={axis}, check_vma=False,
    )  # fmt: skip
    return evaluate(list(points))


def _evaluations(value_and_grad: ValueAndGrad, points: Sequence[Params], axis: str) -> list[Evaluation]:
    """The evaluations of all devices, gathered."""
    places = jax.lax.axis_size(axis)
    evaluations: list[Evaluation] = []
    for start in range(0, len(points), places):
        here = points[start : start + places]
        mine = _chosen(here, jnp.minimum(jax.lax.axis_index(axis), len(here) - 1))
        everywhere = gathered(Evaluation(*value_and_grad(mine)), axis)
        evaluations += [jax.tree.map(lambda leaf, i=i: leaf[i], everywhere) for i in range(len(here))]
    return evaluations


def _chosen(points: Sequence[Params], place: jax.Array) -> Params:
    return jax.tree.map(lambda *leaves: jax.lax.select_n(place, *leaves), *points)
