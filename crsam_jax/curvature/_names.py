"""Names of parameters, from pytree paths and from flat names such as ``conv1.weight`` or ``attn/query/bias``."""

import re
from collections.abc import Sequence
from typing import Any

from jax.tree_util import GetAttrKey, keystr


def names_of(path: Any) -> tuple[str, ...]:
    """The names along a path, outermost first, without the ``.value`` of flax's boxes and variables.

    A key that is itself a flat name is split at "." and "/".

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"block.0": {"attn/query": 1.0}})
      >>> names_of(path)
      ('block', '0', 'attn', 'query')
    """
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    parts = (part for key in path for part in re.split(r"[./]", keystr((key,), simple=True)) if part)
    return tuple(parts)


def nested_order(paths: Sequence[Any]) -> list[int]:
    """For each path the place that its leaf has in the nested tree; without flat names, the order as it is."""
    names = [names_of(path) for path in paths]
    if not any(len(split) > len(path) for split, path in zip(names, paths, strict=True)):
        return list(range(len(names)))
    order = sorted(range(len(names)), key=lambda i: [_rank(name) for name in names[i]])
    places = [0] * len(names)
    for place, i in enumerate(order):
        places[i] = place
    return places


def _rank(name: str) -> tuple[bool, int, str]:
    """Sorts the indices of a list as numbers, before all other names."""
    return (False, int(name), name) if name.isdigit() else (True, 0, name)
