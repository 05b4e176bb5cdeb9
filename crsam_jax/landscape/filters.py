"""Which axes of a parameter number the units that it feeds, by the names that the libraries give their parameters."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from crsam_jax.curvature._names import names_of

Names = tuple[str, ...]
Shape = tuple[int, ...]
Axes = tuple[int, ...] | None
"""Axes that number output units; None for a bias or a gain, which has no filters."""

_BIASES_AND_GAINS = ("bias", "bias_n", "offset", "scale")
_KERNELS = ("kernel", "w", "weight", "weight_ih", "weight_hh")
_ATTENTION_INPUTS = ("query", "key", "value")


def output_axes(params: Any) -> dict[str, Axes]:
    """For each leaf of params the axes that number its output units, as :func:`filter_normalized_directions` sees them.

    A filter is what feeds one output unit: the slice of a kernel at one index of these axes. They follow from the
    leaf's name, the last part of its path. A flat name such as ``conv1.weight`` or ``attn/query/bias`` is a path:

    * ``kernel`` (flax), [..., inputs, outputs]: the last; as many as its bias has, which in attention are the heads
      and their features; those two in attention without biases.
    * ``w`` (Haiku), [..., inputs, outputs]: the last; the last but one in a module with "transpose" in its name.
    * ``weight``, ``weight_ih``, ``weight_hh`` (Equinox), [outputs, inputs, ...]: the first.
    * ``bias``, ``b``, ``offset``, ``scale`` and whatever has fewer than two axes: None, no filters.
    * Any other, [..., inputs, outputs]: the last; None if there is one number a unit, as in a class token
      [1, 1, features].

    Layers stacked along a first axis are recognized by their biases. Where neither a name nor a bias tells the axes,
    the caller must: for a stack or a ``DenseGeneral`` of several output axes without biases, a flax ``ConvTranspose``
    with ``transpose_kernel=True`` and as many inputs as outputs, an Equinox ``Embedding``, whose filters here are
    its rows.

    Args:
      params: pytree of arrays, or of anything with a shape.

    Returns:
      A dict from the leaf's path, as ``jax.tree_util.keystr`` writes it, to a tuple of axes ≥ 0 or None. Print it to
      see what is taken for what; change what is wrong and pass it on.

    Raises:
      ValueError: if a bias does not fit the kernel beside it.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import landscape
      >>> query = {"kernel": jnp.zeros((8, 2, 4)), "bias": jnp.zeros((2, 4))}  # two heads of four features
      >>> for path, axes in landscape.output_axes({"query": query}).items():
      ...   print(path, axes)
      ['query']['bias'] None
      ['query']['kernel'] (1, 2)
    """
    return resolved(params, {})


def resolved(params: Any, given: Mapping[str, Any]) -> dict[str, Axes]:
    """The axes of :func:`output_axes`, replaced by the caller's where there are any.

    Raises:
      ValueError: if ``given`` names no leaf, or axes that the leaf does not have; or as :func:`output_axes`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = {names_of(path): jnp.shape(leaf) for path, leaf in leaves}
    paths = [keystr(path) for path, _ in leaves]
    for unknown in set(given) - set(paths):
        close = difflib.get_close_matches(unknown, paths, n=1) or paths[:1]
        hint = "".join(f"; there is {path!r}, for instance" for path in close)
        raise ValueError(f"output_axes names {unknown!r}, which is no leaf of params{hint}.")
    return {
        path: _checked(path, given[path], jnp.shape(leaf)) if path in given else _by_name(path, names_of(keys), shapes)
        for path, (keys, leaf) in zip(paths, leaves, strict=True)
    }


def _checked(path: str, axes: Any, shape: Shape) -> Axes:
    if axes is None:
        return None
    number = len(shape)
    if not all(isinstance(axis, int) and -number <= axis < number for axis in axes):
        raise ValueError(f"output_axes[{path!r}] must be None or axes of an array of shape {shape}, got {axes!r}.")
    return tuple(sorted({axis % number for axis in axes}))


def _by_name(path: str, names: Names, shapes: Mapping[Names, Shape]) -> Axes:
    *module, name = names or ("",)
    shape = shapes[names]
    last = len(shape) - 1
    if last < 1 or name in _BIASES_AND_GAINS or (name == "b" and _is_haiku_bias(names, shapes)):
        return None
    if name not in _KERNELS:
        return (last,) if math.prod(shape) > shape[last] else None
    if name == "w" and module and "transpose" in module[-1].lower():
        return (last - 1,)
    bias = shapes.get((*module, "b" if name == "w" else "bias"), ())
    if bias:
        return _axes_of_bias(path, name, shape, bias)
    if _is_attention_input(names, shapes):
        return (last - 1, last)
    return (0,) if name.startswith("weight") else (last,)


def _axes_of_bias(path: str, name: str, shape: Shape, bias: Shape) -> Axes:
    """The axes that a kernel shares with its bias: of stacked layers in front, of output units behind or in front."""
    number = len(shape)
    for units in (bias, _without_trailing_ones(bias)):
        count = len(units)
        # How many of the bias's axes stand in front.
        fronts = range(count + 1) if name.startswith("weight") else range(count)
        for front in fronts if name == "kernel" else reversed(fronts):
            axes = (*range(front), *range(number - count + front, number))
            if count <= number and tuple(shape[axis] for axis in axes) == units:
                return axes if count < number else None  # one bias a weight: a gain, which has no filters
    if units == shape[-2:-1]:  # a transposed convolution
        return (number - 2,)
    raise ValueError(
        f"The output axes of {path} are not clear: its shape {shape} does not fit that of the bias beside it, {bias}. "
        f"Pass them: output_axes={{{path!r}: ...}}, a tuple of axes, or None for a parameter without filters."
    )


def _without_trailing_ones(shape: Shape) -> Shape:
    """The shape of a bias without axes of length 1 at its end, which convolutions with channels first give it."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def _is_haiku_bias(names: Names, shapes: Mapping[Names, Shape]) -> bool:
    """Whether a ``b`` of several axes has a ``w`` beside it, or nothing at all as in ``hk.Bias``."""
    return (*names[:-1], "w") in shapes or sum(other[:-1] == names[:-1] for other in shapes) == 1


def _is_attention_input(names: Names, shapes: Mapping[Names, Shape]) -> bool:
    """Whether a kernel [inputs, heads, features] goes with flax's projection [heads, features, outputs]."""
    if len(names) < 2:
        return False
    *attention, layer, name = names
    outward = shapes.get((*attention, "out", name), ())
    return layer in _ATTENTION_INPUTS and len(outward) == 3 and outward[:2] == shapes[names][1:]
