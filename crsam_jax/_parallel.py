"""How the loss is evaluated at several points: in which order, and on which axes of a mesh."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from crsam_jax import _trees as trees
from crsam_jax._checks import check_choice
from crsam_jax._trees import Params

Strategy: TypeAlias = Literal["auto", "vmap", "sequential", "ordered"]

Loss: TypeAlias = Callable[[Params], jax.Array]
"""The loss as a function of params alone."""


class Evaluation(NamedTuple):
    """The loss at a point, a scalar in the loss's own dtype, and its gradient, a tree like params."""

    loss: jax.Array
    grads: Params


class Displacement(NamedTuple):
    """A perturbed point w + factors · v, without the point itself.

    Attributes:
      direction: v, a tree like params.
      factors: scalars; v is multiplied by one after the other, so that no product leaves the range. The last is 0
        where nothing is perturbed.
    """

    direction: Params
    factors: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the loss is evaluated at the points of a step. The numbers are the same up to rounding for every choice.

    Attributes:
      strategy: the order of the evaluations. ``"ordered"``: one after the other, so that one set of activations is
        alive at a time; needs SAM's memory. ``"sequential"``: one plain evaluation per point, which the compiler may
        overlap. ``"vmap"``: all points in one batched evaluation; batching over params makes grouped convolutions and
        batched matrix products, and needs the memory of all points at once. ``"auto"``: the fastest in measurements,
        today ``"ordered"`` on every platform.
      axis_name: axis of ``shard_map`` or ``pmap`` over which losses and gradients of the points are averaged. The
        incoming gradient must be averaged already. Not needed under ``jit`` with sharded arrays.
      sync_perturbation: only with ``axis_name``. ``True``: one perturbation for all devices, from averaged gradients.
        ``False``: the m-sharpness of SAM. The incoming gradients are not averaged; each part of the batch has its own
        perturbation and fallbacks, and the results and diagnostics are averaged at the end (a step counts as guarded
        if any part was). ``jax.vmap(..., axis_name=...)`` over parts of the batch does it on one device.
      probe_axis: a mesh axis over which the points are distributed; each device sees its group's whole batch. Under
        ``jit`` the mesh comes from ``jax.set_mesh``, and arrays may be sharded over its other axes as usual; under
        ``shard_map`` the arguments of the loss must be the same along this axis.

    Raises:
      ValueError: for an unknown strategy, or if both axes are the same.
      TypeError: if an axis is no string, or ``sync_perturbation`` is no bool.

    Example:
      >>> import jax.numpy as jnp, crsam_jax
      >>> execution = crsam_jax.Execution(strategy="ordered", axis_name="data")
      >>> tx = crsam_jax.crsam(lambda w: jnp.sum(w**2), execution=execution)
    """

    strategy: Strategy = "auto"
    axis_name: str | None = None
    sync_perturbation: bool = True
    probe_axis: str | None = None

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, get_args(Strategy))
        for name in ("axis_name", "probe_axis"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise TypeError(f"{name} must be the name of one mesh axis or None, got {value!r}.")
        if not isinstance(self.sync_perturbation, bool):
            raise TypeError(f"sync_perturbation must be True or False, got {self.sync_perturbation!r}.")
        if self.probe_axis is not None and self.probe_axis == self.axis_name:
            raise ValueError(
                f"axis_name and probe_axis are both {self.axis_name!r}: along the first the devices hold different "
                "parts of the batch, along the second the same. Give the mesh another axis for the points."
            )

    @property
    def averaging_axis(self) -> str | None:
        """The axis that each evaluation is averaged over."""
        return self.axis_name if self.sync_perturbation else None

    @property
    def local_axis(self) -> str | None:
        """The axis along which each part of the batch takes a step of its own."""
        return None if self.sync_perturbation else self.axis_name


def checked_execution(execution: Execution | None) -> Execution:
    """The given settings, or the default ones if there are none.

    Raises:
      TypeError: if what was given is not an Execution.
    """
    if execution is None:
        return Execution()
    if not isinstance(execution, Execution):
        raise TypeError(
            f"execution must be a crsam_jax.Execution or None, got {execution!r}; for a strategy by name write "
            'execution=crsam_jax.Execution(strategy="ordered").'
        )
    return execution


# The points of a step


def perturb(params: Params, direction: Params, *factors: jax.Array) -> Params:
    """The point w + factors · v, summed in at least float32 and rounded to the dtypes of params.

    Exactly w where the last factor is 0, whatever v holds.
    """
    is_still = factors[-1] == 0

    def move(w: jax.Array, v: jax.Array) -> jax.Array:
        step = v.astype(w.dtype)
        for factor in factors:
            step = step * factor.astype(w.dtype)
        return jax.lax.select_n(is_still, w + step, w)

    return trees.cast_like(trees.wide_map(move, params, direction), params)


def loss_at(loss: Loss, params: Params, given: Any, axis_name: str | None) -> jax.Array:
    """The loss L(w): the caller's, or evaluated; under jit XLA mostly merges that with the caller's forward pass."""
    value = loss(varying(params, axis_name)) if given is None else varying(given, axis_name)
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


def evaluate(
    loss: Loss, params: Params, displacements: Sequence[Displacement], execution: Execution
) -> list[Evaluation]:
    """Losses and gradients at perturbed points, averaged over the averaging axis if there is one."""
    axis_name = execution.averaging_axis
    value_and_grad = jax.value_and_grad(loss)

    points = [varying(perturb(params, direction, *factors), axis_name) for direction, factors in displacements]

    def one(point: Params) -> Evaluation:
        at = Evaluation(*value_and_grad(point))
        _check_axes(at.loss, point, execution)
        return at

    if len(points) > 1 and execution.probe_axis is not None:  # a single point cannot be distributed
        evaluations = _distributed(one, points, execution.probe_axis)
    elif len(points) > 1 and execution.strategy == "vmap":
        evaluations = _vmapped(one, points)
    else:
        evaluations = []
        for point in points:
            if evaluations and execution.strategy != "sequential":
                evaluations[-1], point = _in_order(evaluations[-1], point)
            evaluations.append(one(point))
    return evaluations if axis_name is None else jax.lax.pmean(evaluations, axis_name)


def _check_axes(loss: jax.Array, point: Params, execution: Execution) -> None:
    """Checks that nothing but the known axes divides the batch.

    Raises:
      ValueError: naming the axis of ``shard_map`` over which losses and gradients would have to be averaged.
    """
    known = {execution.axis_name, execution.probe_axis}.union(*map(_varying_axes, jax.tree.leaves(point)))
    for axis in sorted(set(_varying_axes(loss)) - known):
        raise ValueError(
            f"The loss differs along the mesh axis {axis!r}, and nothing averages it: pass "
            f"execution=crsam_jax.Execution(axis_name={axis!r}) to the method."
        )


def gradient_at(loss: Loss, point: Params, execution: Execution) -> Params:
    """The gradient at one point, averaged over the averaging axis if there is one."""
    axis_name = execution.averaging_axis
    grads = jax.grad(loss)(varying(point, axis_name))
    return grads if axis_name is None else jax.lax.pmean(grads, axis_name)


def _in_order(first: Any, then: Params) -> tuple[Any, Params]:
    """Both unchanged; ``then`` is not available before ``first`` is."""
    ordered: tuple[Any, Params] = jax.lax.platform_dependent(first, then, cpu=_after, default=_after_barrier)
    return ordered


def _vmapped(one: Callable[[Params], Evaluation], points: Sequence[Params]) -> list[Evaluation]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *points)
    together = jax.vmap(one, axis_size=len(points))(stacked)
    return [jax.tree.map(operator.itemgetter(i), together) for i in range(len(points))]


def _after_barrier(first: Any, then: Params) -> tuple[Any, Params]:
    """By a barrier, which the compilers for GPUs and TPUs respect. Both points are ready: one kernel makes both."""
    barred: tuple[Any, Params] = jax.lax.optimization_barrier((first, then))
    return barred


def _after(first: Any, then: Params) -> tuple[Any, Params]:
    """For CPU, where XLA ignores barriers: ``then`` depends on one number of each leaf of ``first``.

    A maximum of absolute values is never −1, but the compiler does not know that (it knows that none is below 0).
    """
    elements = [_element(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(first)]
    never = jnp.max(jnp.abs(jnp.concatenate(elements)), initial=0) == -1
    one = jnp.where(never, jnp.float32(0), jnp.float32(1))
    return first, jax.tree.map(lambda leaf: leaf * one.astype(leaf.dtype), then)


def _element(leaf: jax.Array) -> jax.Array:
    """A vector of one number from the leaf. A leaf that explicit mesh axes divide cannot be sliced: its sum."""
    return jnp.sum(leaf)[None] if trees.is_sharded(leaf) else jnp.ravel(leaf)[:1]


# Points distributed over a mesh axis: the paper's parallel evaluation


def _distributed(one: Callable[[Params], Evaluation], points: Sequence[Params], axis: str) -> list[Evaluation]:
    """Losses and gradients at all points, each evaluated by the devices at one place of the axis.

    With as many places as points each device evaluates once; with fewer, in rounds.

    Raises:
      ValueError: if the axis is neither one of the mesh in context nor mapped over already.
    """
    if is_mapped(axis):
        return _evaluations(one, points, axis)
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        raise ValueError(
            f"probe_axis={axis!r} is no axis of the mesh in context, which has {mesh.axis_names or 'none'}. Under jit "
            "call the step inside `with jax.set_mesh(mesh):` with a mesh that has it."
        )
    # Manual along this axis alone: along the others the compiler still divides the batch.
    replicated = PartitionSpec()
    evaluate: Any = jax.shard_map(
        lambda points: _evaluations(one, points, axis),
        in_specs=(replicated,), out_specs=replicated, axis_names={axis}, check_vma=False,
    )  # fmt: skip
    return evaluate(list(points))


def _evaluations(one: Callable[[Params], Evaluation], points: Sequence[Params], axis: str) -> list[Evaluation]:
    """The evaluations of all devices, gathered."""
    places = jax.lax.axis_size(axis)
    evaluations: list[Evaluation] = []
    for start in range(0, len(points), places):
        here = points[start : start + places]
        mine = _chosen(here, jnp.minimum(jax.lax.axis_index(axis), len(here) - 1))
        everywhere = gathered(one(mine), axis)
        evaluations += [jax.tree.map(lambda leaf, i=i: leaf[i], everywhere) for i in range(len(here))]
    return evaluations


def _chosen(points: Sequence[Params], place: jax.Array) -> Params:
    return jax.tree.map(lambda *leaves: jax.lax.select_n(place, *leaves), *points)


# Values that differ along a mesh axis, and how they become one


def varying(tree: Any, axis_name: str | None) -> Any:
    """A tree marked as differing along the axis, so that gradients with respect to it are not summed over it.

    Inside ``shard_map(check_vma=True)`` the gradient with respect to a replicated value is the sum over the
    axis already; without the check, and under ``pmap`` and ``vmap``, it is local and there is nothing to mark.
    """
    if axis_name is None or axis_name not in jax.sharding.get_abstract_mesh().manual_axes:  # vmap's is not manual
        return tree

    def cast(leaf: Any) -> jax.Array:
        return leaf if axis_name in _varying_axes(leaf) else jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def synced(tree: Any, axis_name: str) -> Any:
    """The mean over the axis for floating leaves, "any" for flags; integers are the same everywhere and stay."""

    def sync(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.lax.pmean(leaf, axis_name)
        if leaf.dtype == bool:  # by a sum, which the compiler can join with the gradient's
            return jax.lax.psum(leaf.astype(jnp.float32), axis_name) > 0
        return jax.lax.pmax(leaf.astype(jnp.int32), axis_name).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: sync(jnp.asarray(leaf)), tree)


def gathered(tree: Any, axis_name: str) -> Any:
    """The values at all places of the axis, stacked along a new first axis."""

    def gather(leaf: jax.Array) -> jax.Array:
        if axis_name not in _varying_axes(leaf):
            return jax.lax.all_gather(leaf, axis_name)
        # Under ``shard_map(check_vma=True)`` a gathered value counts as different along the axis, and a sum does not.
        places = jnp.arange(jax.lax.axis_size(axis_name)).reshape(-1, *[1] * leaf.ndim)
        return jax.lax.psum(jnp.where(places == jax.lax.axis_index(axis_name), leaf, 0), axis_name)

    return jax.tree.map(gather, tree)


def is_mapped(axis_name: str) -> bool:
    """Whether the program is inside of ``shard_map``, ``pmap`` or ``vmap`` over the axis."""
    try:
        jax.lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def _varying_axes(leaf: Any) -> Any:
    """The axes along which a value differs; none where ``shard_map`` does not check that."""
    kind: Any = jax.typeof(leaf)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # jax 0.10 renamed it
