"""The arms of a comparison: the recipe for a name such as ``sam``, ``base-3x`` or ``crsam,crsam.alpha=0``."""

import dataclasses
import re
from typing import Any, NamedTuple

from experiments.settings import ranges
from experiments.settings.overrides import Changes, changed, parse
from experiments.settings.recipes import Recipe
from experiments.settings.suggestions import unknown
from experiments.training.optimizers import METHODS, method_of


class Arm(NamedTuple):
    """One entry of a comparison: a method, ``-Nx`` for N times the epochs, ``,key=value`` for its settings."""

    method: str
    times: float
    settings: dict[str, Any]


def read(name: str) -> Arm:
    """Reads an arm's name.

    Example:
      >>> read("sam-1.5x,sam.rho=0.2")
      Arm(method='sam', times=1.5, settings={'sam.rho': 0.2})
    """
    head, *assignments = name.split(",")
    match = re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)x", head)
    method, times = (match[1], float(match[2])) if match else (head, 1.0)
    return Arm(method, times, parse(assignments))


def resolve(recipe: Recipe, name: str, changes: Changes, seed: int) -> Recipe:
    """The recipe of one run; an unknown method or setting is a ValueError.

    Settings count in this order: the recipe's; those that it has for this arm, or else for its method, or else for
    the method's parent; ``changes``, what was asked for explicitly; the arm's own.
    """
    check_per_method(recipe)
    arm = read(name)
    keys = name, arm.method, method_of(dataclasses.replace(recipe, method=arm.method)).family
    chosen = next((recipe.per_method[key] for key in keys if key in recipe.per_method), {})
    own = changed(dataclasses.replace(recipe, per_method={}), chosen | dict(changes) | arm.settings)
    return dataclasses.replace(own, method=arm.method, epochs=round(arm.times * own.epochs), seed=seed)


def label(recipe: Recipe, name: str) -> str:
    """The name of an arm in tables and plots."""
    arm = read(name)
    times = [f"{arm.times:g}× epochs"] if arm.times != 1 else []
    settings = [f"{key.split('.')[-1]} = {value}" for key, value in arm.settings.items()]
    return ", ".join([method_of(dataclasses.replace(recipe, method=arm.method)).label, *times, *settings])


def check_per_method(recipe: Recipe) -> None:
    """Checks the settings that a recipe has for single arms: the arms' methods, the settings' names, types and ranges.

    Raises:
      ValueError: naming the arm and what is wrong.
    """
    known = {*METHODS, *(method.family for method in METHODS.values())}
    for name, settings in recipe.per_method.items():
        if read(name).method not in known:
            raise unknown("arm in per_method", name, sorted(known))
        try:
            ranges.check(changed(dataclasses.replace(recipe, per_method={}), settings))
        except ValueError as error:
            raise ValueError(f"per_method.{name}: {error}") from error
