"""A workaround for XLA on CPU: convolutions in loops and conditionals at the speed that they have outside.

XLA's CPU compiler brings convolutions into the layout that its fast kernels take (batch, space, features) in the entry
computation of a program only. Those of a gradient inside ``scan``, ``cond`` or ``while_loop`` keep theirs and run some
thirty times slower (https://github.com/jax-ml/jax/issues/12868). To be deleted when XLA does it everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_Function = TypeVar("_Function", bound=Callable[..., Any])


def canonical_convolutions(fn: _Function) -> _Function:
    """The same function, whose convolutions are fast on CPU inside loops and conditionals too.

    Each convolution that ``fn`` traces to, in nested calls, loops and branches too, becomes three steps where the
    program is compiled for a CPU: transposes to the fast layout, the same convolution, and the transpose back. On other
    platforms it is left as it is. What JAX differentiates inside ``fn`` is covered, so wrap ``value_and_grad(loss)``,
    or the whole body of a loop, not the loss; outside of loops and conditionals there is nothing to gain.

    Args:
      fn: from pytrees of arrays to a pytree of arrays, traced anew at every call; it may close over tracers.

    Returns:
      ``fn`` with the same arguments and results, equal up to rounding.

    Example:
      An epoch in one program:

      >>> import jax, jax.numpy as jnp, optax
      >>> from crsam_jax import canonical_convolutions
      >>> def loss_fn(w, images):
      ...   return jnp.mean(jax.lax.conv(images, w, (1, 1), "SAME") ** 2)
      >>> @canonical_convolutions
      ... def step(w, images):
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, images)
      ...   return w - 0.1 * grads, loss
      >>> epoch = jax.jit(lambda w, batches: jax.lax.scan(step, w, batches))
      >>> w, losses = epoch(jnp.ones((3, 1, 3, 3)), jnp.ones((5, 8, 1, 6, 6)))
      >>> bool(losses[-1] < losses[0])
      True
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        program, result = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        leaves = core.jaxpr_as_fun(_rewritten(program))(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(result), leaves)

    return wrapped  # type: ignore[return-value]  # as functools.wraps has it


def _rewritten(value: Any) -> Any:
    """A program with its convolutions replaced, also in programs that its equations hold."""
    if isinstance(value, core.Jaxpr):  # asked first: from jax 0.12 on a ClosedJaxpr is a Jaxpr, with itself as .jaxpr
        return value.replace(eqns=[_rewritten_equation(equation) for equation in value.eqns])
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr))
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_rewritten(item) for item in value)
    return value


def _rewritten_equation(equation: Any) -> Any:
    if equation.primitive is jax.lax.conv_general_dilated_p:
        return equation.replace(primitive=_convolution)
    return equation.replace(params={name: _rewritten(value) for name, value in equation.params.items()})


def _in_fast_layout(images: jax.Array, kernel: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
    """The convolution between transposes to and from (batch, space, features), kernels (space, inputs, outputs)."""
    (batch, features, *space), (outputs, inputs, *window), out = dimension_numbers
    rank = len(space)
    data, weights = (0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank))
    result = jax.lax.conv_general_dilated_p.bind(
        jax.lax.transpose(images, (batch, *space, features)),
        jax.lax.transpose(kernel, (*window, inputs, outputs)),
        dimension_numbers=jax.lax.ConvDimensionNumbers(data, weights, data),
        **params,
    )
    back = [0] * (rank + 2)
    for source, target in zip(data, out, strict=True):
        back[target] = source
    return jax.lax.transpose(result, back)


def _as_it_is(*args: jax.Array, **params: Any) -> jax.Array:
    return jax.lax.conv_general_dilated_p.bind(*args, **params)


def _differentiated(primals: Any, tangents: Any, **params: Any) -> Any:
    dense = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(functools.partial(_as_it_is, **params), tuple(primals), dense)


def _batched(args: Any, axes: Any, **params: Any) -> Any:
    over_batch = jax.vmap(functools.partial(_as_it_is, **params), in_axes=tuple(axes))
    return canonical_convolutions(over_batch)(*args), 0


_convolution = core.Primitive("canonical_convolution")
_convolution.def_impl(_as_it_is)
_convolution.def_abstract_eval(lambda *args, **params: jax.lax.conv_general_dilated_p.abstract_eval(*args, **params)[0])
mlir.register_lowering(_convolution, mlir.lower_fun(_as_it_is, multiple_results=False))
mlir.register_lowering(_convolution, mlir.lower_fun(_in_fast_layout, multiple_results=False), platform="cpu")
batching.primitive_batchers[_convolution] = _batched
ad.primitive_jvps[_convolution] = _differentiated
