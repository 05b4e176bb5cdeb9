"""Validation of numbers and trees, with messages that say what to do."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax.step.types import ScalarOrSchedule

STAND_BEFORE = "These transformations do not wrap one but stand before it: optax.chain(sam(loss_fn), optax.sgd(0.1))."


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


def check_hyperparameter(name: str, value: ScalarOrSchedule, *, below: float = math.inf) -> None:
    """The check of :func:`check_number`, which a schedule passes too."""
    if not callable(value):
        check_number(name, value, below=below)


def check_seed(seed: Any) -> None:
    """Checks that a seed is an integer; tracers pass.

    Raises:
      TypeError: if it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, jax.Array)):
        raise TypeError(f"seed must be an integer, got {seed!r}.")


def value_at(value: ScalarOrSchedule, count: Any, dtype: Any) -> jax.Array:
    """The value of a constant or schedule at a step count, as a strongly typed scalar."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks that ``value`` is one of ``choices``.

    Raises:
      ValueError: naming the valid ones, if it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def check_whole_number(name: str, value: Any, *, at_least: int) -> None:
    """Checks that ``value`` is an int of at least ``at_least``.

    Raises:
      TypeError: if it is not an int.
      ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def check_params(params: Any) -> None:
    """Checks that params are there, whole, and made of real floating arrays.

    Raises:
      ValueError: if params is None, or a mask hides part of it.
      TypeError: if a leaf is no array, or complex or integer.
    """
    if params is None:
        raise ValueError("params is None, but the loss is evaluated at params: call update(grads, state, params, ...).")
    check_leaves(params)


def check_leaves(params: Any) -> None:
    """The check of :func:`check_params`, but None passes: an optimizer's ``init`` leaves that to ``update``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hidden):
        where = jax.tree_util.keystr(path) or "the root"
        if is_hidden(leaf):
            raise ValueError(
                f"params is hidden at {where}: an optax.masked or optax.partition stands around this "
                "transformation, which cannot evaluate the loss on part of the parameters. Put it first in the "
                "chain, outside of them; to perturb only part of the parameters, use its argument mask=."
            )
        if not _is_array(leaf):
            raise TypeError(
                f"params has a leaf of type {kind_of(leaf)} at {where}, which is no array. Keep what is no array out "
                "of params and let loss_fn put it in again; partition an Equinox model first: params, static = "
                f"eqx.partition(model, eqx.is_inexact_array).{_advice(params)}"
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params has dtype {dtype} at {where}; only real floating leaves can be perturbed. Keep other "
                f"leaves out of params and pass them to loss_fn as an argument of its own.{_advice(params)}"
            )


def check_gradient(grads: Any, params: Any) -> None:
    """Checks that the gradient has the structure and the shapes of params.

    Raises:
      ValueError: naming the place, if it does not.
      TypeError: if a leaf is not real and floating.
    """
    found: Any = jax.tree.structure(grads)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(
            f"The gradient does not have the tree structure of params{_missing_leaf(grads, params)}: pass the gradient "
            f"of loss_fn with respect to the same params. Gradient: {found}; params: {expected}."
        )
    for (path, grad), param in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        where = jax.tree_util.keystr(path) or "the root"
        if jnp.shape(grad) != jnp.shape(param):
            raise ValueError(
                f"The gradient has shape {jnp.shape(grad)} at {where} where params has {jnp.shape(param)}; "
                "it must be the gradient of loss_fn with respect to the same params."
            )
        if not jnp.issubdtype(jnp.result_type(grad), jnp.floating):
            raise TypeError(f"The gradient has dtype {jnp.result_type(grad)} at {where}; it must be real and floating.")


def is_hidden(node: Any) -> bool:
    """Whether an optax.masked or optax.partition has put this in the place of a part of the params."""
    return isinstance(node, optax.MaskedNode)


def kind_of(leaf: Any) -> str:
    """What a leaf is, in a few words: a number by its value, an array by dtype and shape, anything else by its type."""
    if isinstance(leaf, (bool, int, float, complex)):
        return repr(leaf)
    if _is_array(leaf):
        return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
    return type(leaf).__name__


def _is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, traced or not, or a number."""
    if isinstance(leaf, type):
        return False
    return isinstance(leaf, (bool, int, float, complex)) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))


def _advice(params: Any) -> str:
    """The advice to add to a message about an object that may be a model."""
    if _is_array(params) or isinstance(params, (Mapping, list, tuple)):
        return ""
    name = f"{type(params).__module__}.{type(params).__qualname__}"
    return (
        f" params is an object of type {name}: if it is a model, pass its parameters alone, from "
        "nnx.split(model, nnx.Param, ...), variables['params'] of Linen, eqx.partition, or the trainable "
        "variables of Keras, and let loss_fn apply the model to them."
    )


def _missing_leaf(grads: Any, params: Any) -> str:
    """What a message says of the first place where the gradient is None and params has an array; else nothing."""
    arrays = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda node: node is None):
        if grad is None and path in arrays:
            return (
                f" (it is None at {jax.tree_util.keystr(path) or 'the root'}, where params has an array: for a leaf "
                "that is not trained pass zeros, or give params without it; mask= says what is not perturbed)"
            )
    return ""
