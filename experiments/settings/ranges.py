"""The ranges of options, stated in their types: what is out of range is refused by name, before any data is read."""

import dataclasses
import math
import typing
from typing import Annotated, Any, NamedTuple


class Range(NamedTuple):
    """Numbers from ``low`` on and below ``high``, the ends included or not.

    Example:
      >>> print(Range(0, 1, with_high=False), Range(1), Range(0, with_low=False), sep="; ")
      in [0, 1); at least 1; greater than 0
    """

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def holds(self, number: float) -> bool:
        """Whether a number is finite and in the range."""
        if abs(number) >= 2.0**1023:  # also a whole number that no float holds
            return False
        is_above = number >= self.low if self.with_low else number > self.low
        is_below = number <= self.high if self.with_high else number < self.high
        return math.isfinite(number) and is_above and is_below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}" if self.with_low else f"greater than {self.low:g}"
        return f"in {'[' if self.with_low else '('}{self.low:g}, {self.high:.10g}{']' if self.with_high else ')'}"


TRACED = "traced"
"""Marks a number that the compiled step takes as an input: runs that differ in such numbers alone share the step."""

Count = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
CountOrNone = Annotated[int, Range(0)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, with_low=False)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, with_high=False)]


def notes_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """What is noted in the types of a dataclass's fields, such as ranges, by dotted name."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{inner}": notes for inner, notes in notes_of(hint).items()}
        options = (hint, *typing.get_args(hint))  # of a number, or of a number or None
        if notes := tuple(note for option in options for note in getattr(option, "__metadata__", ())):
            found[name] = notes
    return found


def ranges_of(kind: Any) -> dict[str, Range]:
    """The ranges in the types of a dataclass's fields, by dotted name."""
    return {name: note for name, notes in notes_of(kind).items() for note in notes if isinstance(note, Range)}


def check(*settings: Any) -> None:
    """Checks all numbers of some settings, and settings that exclude each other.

    Raises:
      ValueError: naming the first option that is out of its range, with the range.

    Example:
      >>> from experiments.settings.configs import Compare
      >>> check(Compare(seeds=0))
      Traceback (most recent call last):
      ValueError: --seeds must be at least 1, got 0.
    """
    for one in settings:
        values = flat(one)
        for name, allowed in ranges_of(type(one)).items():
            if values[name] is not None and not allowed.holds(values[name]):
                raise ValueError(f"{option(name)} must be {allowed}, got {_shown(values[name])}.")
        if hasattr(one, "check_together"):
            one.check_together()


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """All settings of a dataclass, or of what was one in JSON, by dotted name.

    Example:
      >>> from experiments.settings import recipes
      >>> flat(recipes.get("cifar10-wrn28-10"))["crsam.alpha"]
      0.5
    """
    result: dict[str, Any] = {}
    for name, value in (node if isinstance(node, dict) else vars(node)).items():
        is_nested = name != "per_method" and (isinstance(value, dict) or dataclasses.is_dataclass(value))
        result |= flat(value, f"{prefix}{name}.") if is_nested else {prefix + name: value}
    return result


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def _shown(number: float) -> str:
    try:
        return f"{number:.10g}"
    except OverflowError:
        return f"a whole number of {number.bit_length()} bits" if isinstance(number, int) else str(number)
