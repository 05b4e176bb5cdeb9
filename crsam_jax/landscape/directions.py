"""Directions to look along: random and filter-normalized, through given points, along the gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from crsam_jax import _trees as trees
from crsam_jax._checks import check_choice, whole_number
from crsam_jax._loss import LossFn
from crsam_jax.curvature import _vectors
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import MeanLoss, like_params, widened_params
from crsam_jax.curvature._names import nested_order
from crsam_jax.landscape.filters import Axes, resolved

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

VECTORS = ("zero", "scale")


class Plane(NamedTuple):
    """The plane through three points of parameter space.

    Attributes:
      origin: the first point, a pytree.
      directions: two orthonormal directions, pytrees like params.
      coordinates: where the three points lie in the plane, [3, 2], float64; the first is (0, 0), the second (x, 0).
    """

    origin: Any
    directions: tuple[Any, Any]
    coordinates: Array


def filter_normalized_directions(
    params: Any,
    key: jax.Array,
    num_directions: int = 2,
    *,
    vectors: str = "zero",
    output_axes: Mapping[str, Axes] | None = None,
) -> tuple[Any, ...]:
    r"""Random Gaussian directions whose every filter is as long as the filter of params it belongs to.

    A filter is what feeds one output unit: a column of a dense kernel, the weights of one channel of a convolution, of
    one feature of one head in attention. :func:`output_axes` tells by the names of flax, Haiku and Equinox.
    So a step of 1 changes each filter by its own norm, and slices
    of networks whose layers are scaled differently can be compared: scaling a layer by a > 0 and the next one
    by 1/a, which changes nothing in a ReLU network, scales the directions alike.

    The directions are orthogonalized within each filter, before they are scaled. They are therefore orthogonal to
    each other exactly and filter-normalized exactly, which Gram-Schmidt over the whole tree would undo.
    In a filter of fewer than ``num_directions`` weights, those directions are zero that find no room.

    Args:
      params: pytree of real floating arrays.
      key: a JAX random key.
      num_directions: how many, at least 1.
      vectors: what to do with leaves that have no filters: biases and normalization parameters. ``"zero"``, the
        reference's choice for plots: they stay as they are. ``"scale"``: each such leaf counts as one filter.
      output_axes: where the rule by names is wrong, the axes that number the output units: a dict of the form that
        :func:`output_axes` returns, of all leaves or of those to be put right. ``()``: the leaf is one filter; None:
        it has none.

    Returns:
      A tuple of pytrees like params, in at least float32.

    Raises:
      TypeError, ValueError: if params is not real and floating, for a bad number or name, or if the output axes of a
        leaf are not clear.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> params = {"kernel": jnp.arange(1.0, 7.0).reshape(3, 2), "bias": jnp.ones(2)}
      >>> first, second = landscape.filter_normalized_directions(params, jax.random.key(0))
      >>> print(jnp.linalg.norm(first["kernel"], axis=0).round(3), first["bias"])  # √(1+9+25), √(4+16+36)
      [5.916 7.483] [0. 0.]

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, section 4.
    """
    num_directions = whole_number("num_directions", num_directions, at_least=1)
    check_choice("vectors", vectors, VECTORS)
    leaves, structure = jax.tree_util.tree_flatten_with_path(widened_params(params))
    axes = resolved(params, output_axes or {})
    # A flat dict of names gets the directions of its nested tree, whose leaves may have another order.
    places = jax.random.split(key, max(1, len(leaves)))
    keys = [places[place] for place in nested_order([path for path, _ in leaves])]
    per_leaf = []
    for (path, leaf), leaf_key in zip(leaves, keys, strict=True):
        units = axes[keystr(path)]
        if units is None and vectors == "zero":
            per_leaf.append([jnp.zeros_like(leaf)] * num_directions)
        else:
            found = _leaf_directions(np.asarray(leaf), leaf_key, num_directions, units or ())
            per_leaf.append([_vectors.placed_like(direction, leaf) for direction in found])
    return tuple(jax.tree.unflatten(structure, [d[i] for d in per_leaf]) for i in range(num_directions))


def orthonormalized(directions: Sequence[Any]) -> tuple[Any, ...]:
    """Gram-Schmidt over whole trees: unit directions that span the same space. The first keeps its direction.

    Args:
      directions: pytrees of one structure: the ascent direction, eigenvectors, differences of checkpoints.

    Returns:
      As many directions as were given, as pytrees in at least float32.

    Raises:
      ValueError: if a direction is zero, not finite or, up to rounding, a combination of those before it.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> first, second = landscape.orthonormalized([jnp.array([2.0, 0.0]), jnp.array([3.0, 4.0])])
      >>> print(first, second)
      [1. 0.] [0. 1.]
    """
    found: list[Any] = []
    for i, direction in enumerate(directions):
        rest = _vectors.unit(like_params(f"directions[{i}]", direction, trees.widen(directions[0])))
        for _ in range(2):  # the second time removes what rounding left
            for previous in found:
                rest = _without(rest, previous)
        if not _vectors.norm(rest) > 100 * jnp.finfo(trees.wide_dtype(rest)).eps:
            raise ValueError(f"directions[{i}] is zero, not finite, or lies in the span of those before it.")
        found.append(_vectors.unit(rest))
    return tuple(found)


def plane_through(first: Any, second: Any, third: Any) -> Plane:
    """The plane through three parameter vectors, such as three checkpoints or three minima.

    Args:
      first: the origin, a pytree of real floating arrays.
      second: lies on the first axis.
      third: anywhere off that axis.

    Returns:
      A :class:`Plane`, to be passed on: ``surface(loss_fn, plane.origin, plane.directions, xs, ys, data)``.

    Raises:
      TypeError, ValueError: if the trees do not fit each other, or the points lie on one line.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> plane = landscape.plane_through(jnp.zeros(3), jnp.array([2.0, 0, 0]), jnp.array([1.0, 0, 3.0]))
      >>> print(plane.coordinates, plane.directions[1])
      [[0. 0.]
       [2. 0.]
       [1. 3.]] [0. 0. 1.]

    References:
      Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018, section 3.
    """
    origin = widened_params(first)
    edges = [
        jax.tree.map(jnp.subtract, like_params(name, point, origin), origin)
        for name, point in (("second", second), ("third", third))
    ]
    directions = orthonormalized(edges)
    coordinates = [[float(trees.dot(edge, direction)) for direction in directions] for edge in edges]
    coordinates[0][1] = 0.0
    return Plane(origin, (directions[0], directions[1]), np.array([[0.0, 0.0], *coordinates]))


def gradient_direction(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
) -> Any:
    """The ascent direction ∇L(w)/‖∇L(w)‖, the one that SAM looks in; zero if the gradient is exactly zero.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`crsam_jax.curvature.gradient_norm`.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch.

    Returns:
      A pytree like params, of norm 1.

    Raises:
      TypeError: as :func:`crsam_jax.curvature.gradient_norm`.
      ValueError: if the gradient is not finite, or as :func:`crsam_jax.curvature.gradient_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> print(landscape.gradient_direction(lambda w: 0.5 * jnp.sum(w**2), jnp.array([3.0, 4.0])))
      [0.6 0.8]
    """
    params = widened_params(params)
    gradient = MeanLoss(loss_fn, data, has_aux, example_count).gradient(params)
    if not math.isfinite(_vectors.norm(gradient)):
        raise ValueError("The gradient is not finite at params, so it has no direction.")
    return _vectors.unit(gradient)


def _without(tree: Any, unit: Any) -> Any:
    """``tree`` without its component along ``unit``."""
    component = trees.dot(tree, unit)
    return jax.tree.map(lambda x, u: x - component * u, tree, unit)


def _leaf_directions(leaf: Array, key: jax.Array, count: int, units: tuple[int, ...]) -> list[jax.Array]:
    """``count`` directions for one leaf: orthogonal within each filter, each as long as the filter."""
    behind = tuple(range(leaf.ndim - len(units), leaf.ndim))
    moved = jnp.moveaxis(leaf, units, behind)
    filters = moved.reshape(-1, math.prod(leaf.shape[axis] for axis in units))
    largest = jnp.max(jnp.abs(filters), axis=0, initial=0)
    scale = jnp.where(largest > 0, largest, 1)  # so that squares are in range; NaN stays
    lengths = scale * jnp.linalg.norm(filters / scale, axis=0)
    columns: list[jax.Array] = []
    for noise in jax.random.normal(key, (count, *filters.shape), leaf.dtype):
        if len(columns) == len(filters):  # the columns so far span the whole space
            columns.append(jnp.zeros_like(noise))
            continue
        for _ in range(2):  # the second time removes what rounding left
            for column in columns:
                noise = noise - jnp.sum(noise * column, axis=0) * column
        columns.append(noise / jnp.linalg.norm(noise, axis=0))
    return [jnp.moveaxis((lengths * column).reshape(moved.shape), behind, units) for column in columns]
