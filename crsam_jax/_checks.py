"""Checks of numbers and names, with messages that say what to do."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax

STAND_BEFORE = "These transformations do not wrap one but stand before it: optax.chain(sam(loss_fn), optax.sgd(0.1))."

# Characters of a value in an error message.
_LONGEST = 300


def check_number(name: str, value: Any, *, below: float = math.inf) -> None:
    """Checks that a constant is a number in [0, below); tracers pass, their value is not known yet.

    Raises:
      TypeError: if it is not a real number.
      ValueError: if it is negative, not finite, or not below ``below``.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        if isinstance(value, (bool, str)) or np.ndim(value):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError) as error:
        if isinstance(value, optax.GradientTransformation):
            raise TypeError(f"{name} must be a real number, got an optimizer. {STAND_BEFORE}") from None
        raise TypeError(f"{name} must be a real number, got {value!r}.") from error
    if not (0 <= number < below and math.isfinite(number)):
        bounds = "finite and not negative" if math.isinf(below) else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {bounds}, got {number:g}.")


def check_hyperparameter(name: str, value: optax.ScalarOrSchedule, *, below: float = math.inf) -> None:
    """The check of :func:`check_number`, which a schedule passes too."""
    if not callable(value):
        check_number(name, value, below=below)


def check_seed(seed: Any) -> None:
    """Checks that a seed is an integer; tracers pass.

    Raises:
      TypeError: if it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer, jax.Array)):
        raise TypeError(f"seed must be an integer, got {seed!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks that ``value`` is one of ``choices``.

    Raises:
      ValueError: naming the valid ones, if it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Checks that ``value`` is a positive, finite number.

    Raises:
      TypeError: if it is not a number.
      ValueError: if it is not positive and finite.
    """
    check_number(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive.")


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """``value`` as an int, if it is a whole number of Python or NumPy.

    Raises:
      TypeError: if it is not a whole number.
      ValueError: if it is less than ``at_least``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a whole number, got {brief(repr(value))}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")
    return int(value)


def brief(text: Any) -> str:
    """``str(text)``, cut to a length that fits an error message."""
    text = str(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


_Constructor = TypeVar("_Constructor", bound=Callable[..., Any])

_BEHIND = "it belongs to the optimizer behind the method: optax.chain(sam(loss_fn), optax.adamw(...))"

_ELSEWHERE = {
    "adaptive": "asam(loss_fn) scales the perturbation by the size of the weights",
    "adv_optimizer": "rho= and ascent= say where the gradient is taken",
    "base_optimizer": _BEHIND,
    "gamma": "it is an argument of wsam; for SAM with a weight see gradient_norm_penalty",
    "grad_fn": "give the loss, its gradients are taken here",
    "learning_rate": _BEHIND,
    "lr": _BEHIND,
    "momentum": _BEHIND,
    "opaque_mode": "every update is one whole step",
    "optimizer": _BEHIND,
    "reset_state": "every update is one whole step",
    "sync_period": "every update is one whole step; to run it less often wrap it: periodic(sam(loss_fn), 2)",
    "weight_decay": _BEHIND,
}
"""Arguments of other libraries' SAM, and what takes their place."""


def explains_foreign_arguments(constructor: _Constructor) -> _Constructor:
    """The constructor, whose error for an argument of another library's SAM says what to write instead."""
    own = set(inspect.signature(constructor).parameters)

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> Any:
        for name in sorted(kwargs.keys() & (_ELSEWHERE.keys() - own)):
            raise TypeError(
                f"{constructor.__name__} has no argument {name!r}: {_ELSEWHERE[name]}. "
                "docs/how-to/migrating.md shows the lines for other libraries."
            )
        return constructor(*args, **kwargs)

    return construct  # type: ignore[return-value]  # as functools.wraps has it
