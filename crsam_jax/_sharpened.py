"""A loss whose gradient is a method's, for training code that passes nothing but gradients to the optimizer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crsam_jax import _trees as trees
from crsam_jax._crsam import crsam
from crsam_jax._loss import mark_sharpened, refuse_sharpened
from crsam_jax.diagnostics import RandomProbesDiagnostics
from crsam_jax.engine import SharpnessAwareState

Method = Callable[..., optax.GradientTransformationExtraArgs]


def sharpened(
    loss_fn: Callable[..., Any],
    method: Method = crsam,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **settings: Any,
) -> Callable[..., Any]:
    """A function with the value of ``loss_fn`` and the gradient of a sharpness-aware method.

    Use it where the training code calls ``jax.value_and_grad(loss_fn)`` itself and passes only gradients to the
    optimizer. Loss scaling, added penalties, sums over micro-batches and a mean over devices work on its gradient as
    usual; each micro-batch or device then has its own perturbation (m-sharpness).

    Evaluating it costs one evaluation of ``loss_fn``; differentiating it costs as much as the method does. There are no
    diagnostics and no memory between steps: for those use the method as an optax stage.

    Args:
      loss_fn: ``loss_fn(*args, **kwargs) -> loss``, a real floating scalar, or ``(loss, aux)`` with ``has_aux=True``.
        It must be pure: split an nnx module into its parts and pass them as arguments.
      method: the constructor of an optax stage without memory: :func:`sam`, :func:`asam`, :func:`gsam`, :func:`wsam`,
        :func:`gradient_norm_penalty` or :func:`crsam`.
      argnums: which positional argument holds the params, or several that hold parts of them: one perturbation with
        one norm for all parts. The gradient with respect to other arguments is the plain gradient of ``loss_fn``.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``. The aux comes from the evaluation at w. Its gradient
        is the plain one, so a penalty that is added from it counts.
      **settings: the method's settings. Numbers may be traced, so a schedule is called in the step:
        ``rho=schedule(step)``.

    Returns:
      A function with the arguments, the value and the aux of ``loss_fn``.

    Raises:
      TypeError: if an argument is wrong; if a setting is a schedule; if ``loss_fn`` is sharpened already; if the
        function is differentiated twice.
      ValueError: if the method remembers something between steps, or draws random numbers for each step.

    Example:
      >>> import jax, jax.numpy as jnp, crsam_jax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> sharp = crsam_jax.sharpened(loss_fn, crsam_jax.sam, rho=0.5)
      >>> loss, gradient = jax.value_and_grad(sharp)(jnp.array([3.0, 4.0]))
      >>> print(loss, gradient)  # L(w), and w + 0.5 w/‖w‖
      12.5 [3.3 4.4]
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {loss_fn!r}.")
    refuse_sharpened(loss_fn)
    if isinstance(method, optax.GradientTransformation) or not callable(method):
        raise TypeError(f"method must be a constructor, as in sharpened(loss_fn, crsam_jax.sam); got {method!r}.")
    positions = _positions(argnums)
    _refuse_schedules(settings)

    @functools.wraps(loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if max(positions) >= len(args):
            raise TypeError(f"argnums={argnums}, but the loss was called with {len(args)} positional arguments.")
        parts = tuple(args[position] for position in positions)
        others = [None if i in positions else arg for i, arg in enumerate(args)]
        arrays, merge = _partitioned((others, kwargs, settings))
        merge_aux: Any = None

        def loss_and_aux(params: Any, arrays: Any) -> tuple[Any, Any]:
            nonlocal merge_aux
            positional, named, _ = merge(arrays)
            for position, part in zip(positions, (params,) if isinstance(argnums, int) else params, strict=True):
                positional[position] = part
            result = loss_fn(*positional, **named)
            loss, aux = result if has_aux else (result, None)
            aux_arrays, merge_aux = _partitioned(aux)  # aux may hold strings, functions and the like
            return loss, aux_arrays

        params = parts[0] if isinstance(argnums, int) else parts
        loss, aux_arrays = _with_gradient_of(method, loss_and_aux, lambda arrays: merge(arrays)[2])(params, arrays)
        return (loss, merge_aux(aux_arrays)) if has_aux else loss

    mark_sharpened(wrapped)
    return wrapped


def _positions(argnums: Any) -> tuple[int, ...]:
    """The positions of the params.

    Raises:
      TypeError: if they are not whole numbers of at least 0.
    """
    positions = (argnums,) if isinstance(argnums, int) else argnums
    if not (isinstance(positions, (tuple, list)) and positions) or any(
        isinstance(position, bool) or not isinstance(position, int) or position < 0 for position in positions
    ):
        raise TypeError(f"argnums must be the position of params, a whole number, or several; got {argnums!r}.")
    return tuple(positions)


def _with_gradient_of(method: Method, loss_and_aux: Any, settings_of: Any) -> Callable[..., Any]:
    """``loss_and_aux(params, arrays)``, whose loss is differentiated with respect to params by the method.

    Every array is an argument: the derivative may be taken behind ``jit`` or ``scan``, after the call has returned.
    """
    value = jax.custom_jvp(loss_and_aux)

    def loss_at(params: Any, arrays: Any) -> Any:
        return loss_and_aux(params, arrays)[0]

    @functools.partial(value.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        params, arrays = primals
        change, other_changes = jax.tree.map(_dense, tangents, primals, is_leaf=_is_zero)
        (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params, arrays)
        stage = method(lambda w: loss_at(w, arrays), **settings_of(arrays))
        state = stage.init(params)
        _refuse_memory(method, state)
        gradient = _differentiated_once(stage.update(grads, state, params, loss=loss)[0])
        along = trees.dot(gradient, change).astype(loss.dtype)
        if not all(map(_is_zero, jax.tree.leaves(tangents[1], is_leaf=_is_zero))):
            along = along + jax.jvp(lambda a: loss_at(params, a), (arrays,), (other_changes,))[1]
        aux_along = _aux_change(lambda *at: loss_and_aux(*at)[1], primals, (change, other_changes))
        return (loss, aux), (along, aux_along)

    return value


def _aux_change(aux_at: Any, point: Any, along: Any) -> Any:
    """The plain derivative of the aux; whoever does not differentiate the aux does not pay for it."""
    return jax.checkpoint(lambda point, along: jax.jvp(aux_at, point, along)[1])(point, along)


@jax.custom_jvp
def _differentiated_once(gradient: Any) -> Any:
    return gradient


@_differentiated_once.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise TypeError(
        "A sharpened loss can be differentiated once: its gradient is a method's, which is no function's derivative. "
        "For a Hessian differentiate loss_fn itself."
    )


def _partitioned(inputs: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and the function that puts arrays back into their places."""
    leaves, structure = jax.tree.flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

    def merge(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[i] for i in places], merge


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _dense(tangent: Any, primal: Any) -> Any:
    """The tangent, of zeros where there is none: as sharded as the primal, and varying along the same mesh axes.

    Integers and keys have a tangent without data.
    """
    if not _is_zero(tangent):
        return tangent
    if jnp.issubdtype(primal.dtype, jnp.floating):
        return jnp.zeros_like(primal)
    return np.zeros(primal.shape, jax.dtypes.float0)


def _refuse_schedules(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if callable(value) and name not in ("mask", "adaptive"):
            raise TypeError(
                f"{name} is a function, but a loss counts no steps: call the schedule in your step, "
                f"{name}=schedule(step), or use the method as an optax stage."
            )


def _refuse_memory(method: Method, state: Any) -> None:
    is_plain = isinstance(state, SharpnessAwareState) and not jax.tree.leaves(state.ascent)
    if not is_plain or isinstance(state.diagnostics, RandomProbesDiagnostics):
        name = getattr(method, "__name__", repr(method))
        raise ValueError(
            f"{name} with these settings carries a state from step to step, which a loss cannot keep. Use it as a "
            f"stage of the optimizer: optax.chain(crsam_jax.{name}(loss_fn, ...), optimizer)."
        )
