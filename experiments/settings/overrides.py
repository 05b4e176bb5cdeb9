"""Settings by their dotted names: ``crsam.rho=0.2`` on the command line, in a file, in a search, in an arm's name."""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.settings import python_files, recipes
from experiments.settings.ranges import check, flat
from experiments.settings.recipes import Recipe
from experiments.settings.sources import absolute, in_python_file, is_own, is_path
from experiments.settings.suggestions import unknown
from experiments.system import files

Changes = Mapping[str, Any]
"""From dotted names to values."""


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with some settings changed; an unknown name or a value of another type is a ValueError.

    Example:
      >>> changed(recipes.get("digits"), {"crsam.rho": 0.3, "model_options.width": 8}).model_options
      {'width': 8}
    """

    def with_one(node: Any, name: str, key: str, value: Any) -> Any:
        """The recipe, or a group of its settings such as ``crsam``, with one of them changed."""
        if isinstance(node, dict):
            return node | {name: value}
        head, _, tail = name.partition(".")
        kinds = typing.get_type_hints(type(node)) if dataclasses.is_dataclass(node) else {}
        if head not in kinds:
            raise unknown("setting", key, flat(recipe))
        value = with_one(getattr(node, head), tail, key, value) if tail else value
        if key in ("dataset", "model") and isinstance(value, str):
            value = absolute(value)
        return dataclasses.replace(node, **{head: _checked(key, value, kinds[head])})

    for key, value in changes.items():
        recipe = with_one(recipe, key, key, value)
    return recipe


def parse(assignments: Iterable[str]) -> dict[str, Any]:
    """From ``key=value`` to names and values; a value is JSON, or a bare string.

    Example:
      >>> parse(["crsam.rho=0.2", "crsam.penalty=linear", "ema=null"])
      {'crsam.rho': 0.2, 'crsam.penalty': 'linear', 'ema': None}
    """
    result = {}
    for text in assignments:
        key, is_assigned, value = text.partition("=")
        if not is_assigned:
            raise ValueError(f"A setting is changed by key=value, got {text!r}.")
        with contextlib.suppress(json.JSONDecodeError):
            value = files.from_json(value)
        result[key.replace("-", "_")] = value
    return result


def read(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, nested or by dotted names: a few of them, or the whole config.json of a run."""
    return flat(files.read_json(path))


def find(name: str) -> Recipe:
    """A recipe by its name, or of other forms.

    Args:
      name: of a recipe; a file ending in .json, one that ``tune`` wrote or the config.json of a run; FILE.py:RECIPE;
        or data of the user, a path or ``tfds:NAME``, with the settings of :func:`recipes.for_data`.
    """
    if in_python_file(name):
        return _in_file(name)
    if not name.endswith(".json"):
        return _for_data(name) if is_own(name) else recipes.get(name)
    settings = read(Path(name))
    try:
        recipe = from_settings(settings)
        check(recipe)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return recipe


def _for_data(name: str) -> Recipe:
    if not is_path(name):
        return recipes.for_data(name, has_validation=False)
    from experiments.data import arrays, folder  # here: other recipes need neither

    path = Path(name).expanduser()
    return recipes.for_data(name, (arrays if path.suffix == ".npz" else folder).has_validation(path))


def _in_file(name: str) -> Recipe:
    """The recipe that a Python file defines; its data and network may be of the same file, as ``:NAME``."""
    recipe = python_files.find(name)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} must be a Recipe of experiments.settings.recipes, got {type(recipe).__name__}.")
    file = name.rpartition(":")[0]
    here = {
        key: file + value
        for key in ("dataset", "model")
        if isinstance(value := getattr(recipe, key), str) and value.startswith(":")
    }
    recipe = from_settings(flat(recipe) | here)
    check(recipe)
    return recipe


def from_settings(settings: Changes) -> Recipe:
    """A recipe from its settings by dotted name; what they lack has its default, or else it is a ValueError."""
    required = [f.name for f in dataclasses.fields(Recipe) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := sorted(set(required) - settings.keys()):
        raise ValueError(f"This is no recipe: {', '.join(missing)} is missing.")
    return changed(Recipe(**{name: settings[name] for name in required}), settings)


def _checked(key: str, value: Any, kind: Any) -> Any:
    """The value, if it is of the setting's type."""
    origin, options = typing.get_origin(kind) or kind, typing.get_args(kind)
    if types.NoneType in options and typing.get_origin(options[0]) is typing.Literal:
        return None if value is None else _checked(key, value, options[0])
    if origin is typing.Literal:
        if value not in options:
            raise unknown(f"value of {key}", str(value), options)
        return value
    kinds = options if origin in (types.UnionType, typing.Union) else (origin,)
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{key} must be less than 2⁶³ in size, got a number of {len(str(value)[:5000])} digits.")
    if float in kinds and type(value) is int:
        value = float(value)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " | ".join("None" if one is types.NoneType else one.__name__ for one in kinds)
        raise ValueError(f"{key} must be of type {names}, got {repr(value)[:100]}.")
    return value
