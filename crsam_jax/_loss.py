"""Calling a loss function with arguments taken by name, and checking what it returns."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax._checks import STAND_BEFORE
from crsam_jax._trees import kind_of

# Arguments that optax's own transformations exchange; they may describe another loss.
RESERVED_NAMES = frozenset({"value", "grad", "value_fn"})

# From this similarity on, as difflib measures it, one name is taken for a misspelling of the other.
_CLOSE = 0.75

# The loss of params alone, given at ``update``: optax's own name, and Levanter's.
_CLOSURES = ("value_fn", "obj_fn")

# The attribute that marks a sharpened loss; functools.wraps passes it on.
_MARK = "_crsam_jax_is_sharpened"

_UPDATE_PARAMETERS = frozenset({"updates", "state", "params", "loss"})

_POSITIONAL_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class LossFn(Protocol):
    """``loss_fn(params, **kwargs) -> loss``, a real floating scalar, or ``(loss, aux)``."""

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The loss at params."""


class LossBinder:
    """Turns ``loss_fn`` and a mapping of arguments into a checked function of ``params`` alone.

    Args:
      loss_fn: the loss; its first parameter is ``params``, the others are taken by name. ``None``: it is given at
        each call, as ``value_fn`` or ``obj_fn``.
      has_aux: whether it returns ``(loss, aux)``; ``aux`` is dropped.
      call: how the caller is given the arguments, with ``{}`` in their place; for error messages.

    Raises:
      TypeError: if ``loss_fn`` is not callable, or cannot be called with ``params`` and keywords.
    """

    def __init__(self, loss_fn: LossFn | None, has_aux: bool, call: str = "update(grads, state, params, {})"):
        if not isinstance(has_aux, bool):
            raise TypeError(f"has_aux must be True or False, got {has_aux!r}.")
        self._has_aux = has_aux
        self._call = call
        self._loss_fn: Any = loss_fn
        if loss_fn is None:
            return
        if not callable(loss_fn):
            raise TypeError(_not_callable_message(loss_fn))
        refuse_sharpened(loss_fn)
        self._required, self._optional, self._takes_all = _keyword_parameters(loss_fn)
        taken = [name for name in self._required if name in _UPDATE_PARAMETERS]
        if "params" in taken:
            raise TypeError(
                f"params must be the first argument of loss_fn, got {_describe(loss_fn)}: write it as "
                "loss_fn(params, ...); the others are passed by name, in any order."
            )
        if taken:
            raise TypeError(
                f"loss_fn {_describe(loss_fn)} takes {_quoted(taken)}, but update(updates, state, params, loss=...) "
                "has a parameter of that name itself and cannot pass it on; rename it, say to 'model_state'."
            )

    def __call__(self, given: Mapping[str, Any]) -> Callable[[Any], jax.Array]:
        """Returns ``params -> loss``, a real floating scalar, with the arguments in ``given`` bound.

        Raises:
          TypeError: if an argument that ``loss_fn`` requires is missing; and, when the returned function
            runs, if the loss is not a real floating scalar or does not match ``has_aux``.
        """
        if self._loss_fn is None:
            return self._of_closure(given)
        kwargs = self.arguments(given)

        def loss(params: Any) -> jax.Array:
            try:
                result = self._loss_fn(params, **kwargs)
            except Exception as error:
                for note in _hints(self._loss_fn, params, error):
                    error.add_note(note)
                raise
            return _checked_loss(result, self._has_aux)

        return loss

    def _of_closure(self, given: Mapping[str, Any]) -> Callable[[Any], jax.Array]:
        """The loss that the caller gave at this call.

        Raises:
          TypeError: if there is none.
        """
        for name in _CLOSURES:
            if callable(given.get(name)):
                others = {key: value for key, value in given.items() if key != name}
                return LossBinder(given[name], self._has_aux, self._call)(others)
        raise TypeError(
            "The method was built without loss_fn and got no loss either: pass one of them, "
            f"crsam(loss_fn, ...) or {self._call.format('value_fn=loss_of_params')}."
        )

    def refuse_positional(self, args: tuple[Any, ...]) -> None:
        """Raises if the caller gave arguments of ``loss_fn`` by position.

        Raises:
          TypeError: naming them, if there are any.
        """
        if not args:
            return
        if self._loss_fn is None:
            raise TypeError(f"Pass the loss by name: {self._call.format('value_fn=loss_of_params')}.")
        names = self._required or self._optional or ["batch"]
        raise TypeError(
            f"{len(args)} argument(s) too many by position. The arguments of loss_fn {_describe(self._loss_fn)} are "
            f"passed by name: {self._call.format(', '.join(f'{name}=...' for name in names))}."
        )

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments in ``given`` that ``loss_fn`` takes, by name.

        Raises:
          TypeError: if an argument that ``loss_fn`` requires is missing.
        """
        missing = [name for name in self._required if name not in given]
        if missing:
            raise TypeError(_missing_message(self._loss_fn, missing, given, self._call))
        self._warn_of_close_names(given)
        if self._takes_all:
            names = [n for n in given if n not in RESERVED_NAMES or n in self._required + self._optional]
        else:
            names = [n for n in self._required + self._optional if n in given]
        return {name: given[name] for name in names}

    def _warn_of_close_names(self, given: Mapping[str, Any]) -> None:
        """Warns of an argument that is dropped though it looks like one that ``loss_fn`` would have taken."""
        if self._takes_all:
            return
        left_out = [name for name in self._optional if name not in given]
        for name in given.keys() - RESERVED_NAMES - {*self._required, *self._optional}:
            for close in difflib.get_close_matches(name, left_out, n=1, cutoff=_CLOSE):
                warnings.warn(
                    f"loss_fn {_describe(self._loss_fn)} has no argument {name!r}, and does not get it. Did you mean "
                    f"{close!r}, which has its default now?",
                    UserWarning,
                    stacklevel=3,
                )


def checked_loss(loss: Any) -> jax.Array | None:
    """L(w) as the caller gives it, or None.

    Raises:
      TypeError: if it is not a real floating scalar.
    """
    if loss is None:
        return None
    try:
        value = jnp.asarray(loss)
        is_scalar = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating)
    except (TypeError, ValueError):
        is_scalar = False
    if not is_scalar:
        raise TypeError(
            "loss= takes L(w), the scalar that value_and_grad returned for loss_fn at these params; got "
            f"{_summary(loss)}. With has_aux=True pass the loss alone, without aux."
        )
    return value


def _keyword_parameters(loss_fn: LossFn) -> tuple[list[str], list[str], bool]:
    """Names of the required and the optional keyword arguments, and whether there is a ``**kwargs``."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except ValueError as error:
        raise TypeError(
            f"The signature of loss_fn {loss_fn!r} cannot be read; wrap it: lambda params, batch: ..."
        ) from error
    if not parameters or parameters[0].kind not in (*_POSITIONAL_KINDS, inspect.Parameter.VAR_POSITIONAL):
        raise TypeError(f"loss_fn must take params as its first positional argument, got {_describe(loss_fn)}.")
    required: list[str] = []
    optional: list[str] = []
    takes_all = False
    for parameter in parameters[1:]:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"loss_fn {_describe(loss_fn)} has the positional-only argument {parameter.name!r}, but every "
                "argument after params is passed by name; remove the '/' or wrap it in a lambda."
            )
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            (required if parameter.default is inspect.Parameter.empty else optional).append(parameter.name)
    return required, optional, takes_all


def _hints(loss_fn: LossFn, params: Any, error: Exception) -> Iterator[str]:
    """What may have made ``loss_fn`` fail, as far as it shows."""
    if isinstance(params, jax.Array) and params.ndim == 1:
        yield (
            "params reached loss_fn as one flat vector. If an optax.flatten stands around this transformation, move it "
            "behind it in the chain: the loss needs the whole tree of parameters (mask= perturbs only part of it)."
        )
    if f"'{type(params).__name__}' object is not callable" in str(error):
        yield (
            "params reaches loss_fn as the tree that init got, not as a model: apply the model to it inside loss_fn, "
            "with nnx.merge(graphdef, params, ...) for instance."
        )
    _, *others = inspect.signature(loss_fn).parameters.values()
    for parameter in others:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            yield f"loss_fn takes *{parameter.name}, which gets nothing: all arguments are passed by name."


def mark_sharpened(loss_fn: Any) -> None:
    """Marks a loss whose gradient is a method's already."""
    setattr(loss_fn, _MARK, True)


def refuse_sharpened(loss_fn: Any) -> None:
    """Raises if a method would be applied to the gradient of a method.

    Raises:
      TypeError: saying where the method belongs.
    """
    if getattr(loss_fn, _MARK, False):
        raise TypeError(
            "loss_fn is a sharpened loss: its gradient is a method's already. Give the original loss, and use the "
            "method once, either as crsam_jax.sharpened(loss_fn, ...) or as a stage of the optimizer."
        )


def _not_callable_message(loss_fn: Any) -> str:
    if isinstance(loss_fn, optax.GradientTransformation):
        return f"loss_fn must be callable, got an optimizer. {STAND_BEFORE}"
    hint = ""
    if isinstance(loss_fn, (jax.Array, np.ndarray, float)):
        hint = (
            " Under optax.inject_hyperparams a function is called as a schedule, unless it is named as static: "
            "optax.inject_hyperparams(crsam, static_args='loss_fn')(loss_fn, ...)."
        )
    return f"loss_fn must be callable, got {kind_of(loss_fn)}.{hint}"


def _missing_message(loss_fn: LossFn, missing: list[str], given: Mapping[str, Any], call: str) -> str:
    message = (
        f"loss_fn {_describe(loss_fn)} needs {_quoted(missing)}, which was not given "
        f"(given: {_quoted(given) or 'no extra arguments'}). "
        f"Pass them by name: {call.format(', '.join(f'{n}=...' for n in missing))}."
    )
    if not given:
        message += (
            " Flax's TrainState.apply_gradients hands none on: call state.tx.update(...) with them and then "
            "state.replace(...) instead."
        )
    for name in missing:
        close = difflib.get_close_matches(name, given)
        if close:
            message += f" Did you mean {name!r} where you passed {_quoted(close)}?"
    return message


def _checked_loss(result: Any, has_aux: bool) -> jax.Array:
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"has_aux=True, so loss_fn must return (loss, aux), but it returned {_summary(result)}; "
                "return the aux, or leave has_aux out."
            )
        result = result[0]
    elif isinstance(result, tuple):
        raise TypeError(
            f"loss_fn returned {_summary(result)}; pass has_aux=True if this is (loss, aux), "
            "else return the loss alone."
        )
    try:
        loss = jnp.asarray(result)
    except (TypeError, ValueError) as error:  # jax raises ValueError for None
        raise TypeError(f"loss_fn must return a scalar loss, but it returned {_summary(result)}.") from error
    if loss.ndim:
        raise TypeError(
            f"loss_fn must return a scalar, but its loss has shape {loss.shape}; average over the examples."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return a real floating loss, but its dtype is {loss.dtype}.")
    return loss


def _describe(loss_fn: LossFn) -> str:
    name = getattr(loss_fn, "__qualname__", None) or type(loss_fn).__name__
    return f"{name}{inspect.signature(loss_fn)}"


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _summary(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    return f"a value of type {type(result).__name__}"
