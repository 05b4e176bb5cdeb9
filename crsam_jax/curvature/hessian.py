"""The gradient's length and the Hessian's action, over one batch or a whole data set."""

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree

from crsam_jax import _trees as trees
from crsam_jax._loss import LossFn
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import MeanLoss, Progress, like_params, widened_params


def gradient_norm(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
) -> float:
    r"""The norm of the gradient, :math:`\|\nabla L(w)\|`, Euclidean over the whole tree. Costs one gradient.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, a real floating scalar, the mean over the batch's examples; or
        ``(loss, aux)``. Its arguments after params are taken by name. Keep one and the same function object
        for many calls, and it is compiled once.
      params: pytree of real floating arrays; half precision is widened to float32 first.
      data: a batch, which is a mapping of argument names to values, or an iterable of batches that starts afresh
        each time it is gone through. None: the loss needs no arguments.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: from a batch to the number of examples that its loss is the mean of, the weight of the batch in
        the data set. None: the length of the leading axis that the arrays of the argument named ``batch`` share, or
        those of all arguments if none has that name; :class:`Batches` knows its own.

    Returns:
      A float.

    Raises:
      TypeError: if ``loss_fn``, ``data`` or a batch has the wrong form, or params is traced.
      ValueError: if ``data`` is empty or its number of examples is not clear.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w, batch: jnp.mean(batch @ w)
      >>> w, examples = jnp.zeros(2), jnp.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
      >>> curvature.gradient_norm(loss_fn, w, {"batch": examples[:2]})
      5.0
      >>> round(curvature.gradient_norm(loss_fn, w, [{"batch": examples[:2]}, {"batch": examples[2:]}]), 4)
      3.3333
    """
    params = widened_params(params)
    loss = MeanLoss(loss_fn, data, has_aux, example_count)
    return float(trees.norm(loss.gradient(params)))


def hessian_vector_product(
    loss_fn: LossFn,
    params: Any,
    vector: Any,
    data: Data | None = None,
    *,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
) -> Any:
    r"""The exact product :math:`\nabla^2 L(w)\, v`, by forward over reverse differentiation.

    Costs about two to three gradients, in time and memory.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays.
      vector: v, a pytree with the structure and shapes of params.
      data: a batch or an iterable of batches.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.

    Returns:
      A pytree like params, in at least float32.

    Raises:
      TypeError: as :func:`gradient_norm`.
      ValueError: as :func:`gradient_norm`, or if ``vector`` does not fit params.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: w[0] ** 2 + 3 * w[0] * w[1]
      >>> print(curvature.hessian_vector_product(loss_fn, jnp.ones(2), jnp.array([1.0, 1.0])))
      [5. 3.]

    References:
      Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6, 1994.
    """
    params = widened_params(params)
    vector = like_params("vector", vector, params)
    return MeanLoss(loss_fn, data, has_aux, example_count).hvp(params, vector)


def flat_hessian(
    loss: MeanLoss, params: Any, total: int, progress: Progress | None
) -> Callable[[jax.Array], jax.Array]:
    """The function v -> ∇²L(w) v for vectors of shape [n], reporting each of ``total`` products."""
    _, unravel = ravel_pytree(params)
    done = 0

    def product(vector: jax.Array) -> jax.Array:
        nonlocal done
        result: jax.Array = jax.block_until_ready(ravel_pytree(loss.hvp(params, unravel(vector)))[0])
        done += 1
        if progress is not None:
            progress(done, total)
        return result

    return product
