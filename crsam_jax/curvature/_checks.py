"""Validation of arguments, with messages of bounded length."""

import operator
from typing import Any

from crsam_jax._checks import check_number

_LONGEST = 300


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """``value`` as an int; numpy's whole numbers count.

    Raises:
      TypeError: if it is not a whole number.
      ValueError: if it is less than ``at_least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {brief(repr(value))}.") from None
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {number}.")
    return number


def check_positive(name: str, value: Any) -> None:
    """Checks that ``value`` is a positive, finite number.

    Raises:
      TypeError: if it is not a number.
      ValueError: if it is not positive and finite.
    """
    check_number(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive.")


def brief(text: Any) -> str:
    """``str(text)``, cut to a length that fits an error message."""
    text = str(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
