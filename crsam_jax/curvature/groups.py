"""Parts of the parameters: masks, layers and other groups, and a plot of what was measured of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from crsam_jax.ascents import Mask, broadcast_mask
from crsam_jax.curvature._names import names_of
from crsam_jax.curvature.results import Estimate

GroupOf = Callable[[str], str | None]
"""From a leaf's path, such as ``"block1/conv/kernel"``, to the name of its group; None leaves the leaf out."""


def keep_of(mask: Mask | None, params: Any) -> tuple[bool, ...]:
    """For each leaf of params whether the mask keeps it; all of them without a mask.

    Raises:
      TypeError: if the mask holds anything but bools.
      ValueError: if it does not fit params, or keeps no leaf.
    """
    keep = tuple(jax.tree.leaves(broadcast_mask("mask", True if mask is None else mask, params)))
    if mask is not None and not any(keep):
        raise ValueError("mask keeps no leaf of params.")
    return keep


def parameter_groups(params: Any, group_of: GroupOf | None = None) -> dict[str, Any]:
    """Masks that select the parameters of each layer, or of other groups, in the order of params.

    Args:
      params: a pytree.
      group_of: from the path of a leaf, its names joined by "/", to the name of its group; None leaves the leaf out.
        By default a group is what shares all of its path but the last name: a layer's kernel and bias.

    Returns:
      A dict from the name of a group to a mask, a pytree of bools like params. Pass it as ``mask=``.

    Raises:
      ValueError: if there is no group.

    Example:
      >>> from crsam_jax import curvature
      >>> params = {"first": {"kernel": 1.0, "bias": 2.0}, "second": {"kernel": 3.0}}
      >>> curvature.parameter_groups(params)["first"]
      {'first': {'bias': True, 'kernel': True}, 'second': {'kernel': False}}
      >>> list(curvature.parameter_groups(params, lambda path: path.split("/")[-1]))
      ['bias', 'kernel']
    """
    paths = [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [_layer(path) if group_of is None else group_of("/".join(path)) for path in paths]
    structure = jax.tree.structure(params)
    groups = {
        group: jax.tree.unflatten(structure, [name == group for name in names])
        for group in dict.fromkeys(names)
        if group is not None
    }
    if not groups:
        raise ValueError("No parameter is in a group: group_of returned None for every path, or params is empty.")
    return groups


def plot_by_group(values: Mapping[str, Estimate | float], axes: Any = None, label: str = "") -> Any:
    """A bar for each group, with its standard error if it has one.

    Args:
      values: from the name of a group to a number or an :class:`Estimate`, as :func:`hessian_trace_by_group` returns.
      axes: matplotlib's axes to draw into; new ones by default.
      label: what the numbers are, written below the axis.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.

    Example:
      >>> from crsam_jax import curvature
      >>> axes = curvature.plot_by_group({"first": 3.0, "second": curvature.Estimate(1.0, 0.1, 20)})
      >>> [label.get_text() for label in axes.get_yticklabels()]
      ['first', 'second']
    """
    if axes is None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot_by_group needs matplotlib: pip install "crsam_jax[curvature]".') from error
        axes = Figure(figsize=(6, 1 + 0.25 * len(values)), layout="constrained").add_subplot()
    estimates = [value if isinstance(value, Estimate) else Estimate(float(value), 0.0, 0) for value in values.values()]
    axes.barh(range(len(values)), [e.mean for e in estimates], xerr=[e.standard_error for e in estimates])
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return axes


def _layer(path: tuple[str, ...]) -> str:
    return "/".join(path[:-1]) or "/".join(path) or "params"
