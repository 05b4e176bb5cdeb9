"""The gradient's length and products with the Hessian, the Gauss-Newton and the Fisher matrix."""

from typing import Any

from crsam_jax._loss import LossFn
from crsam_jax.ascents import Mask
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature.composed import Composed
from crsam_jax.curvature.objective import Objective


def gradient_norm(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    mask: Mask | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
) -> float:
    r"""The norm of the gradient, :math:`\|\nabla L(w)\|`, Euclidean over the whole tree. Costs one gradient.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, a real floating scalar, the mean over the batch's examples; or
        ``(loss, aux)``. Its arguments after params are taken by name. Compiled programs, and what the loss closes over,
        are kept for the 8 losses used last: use the same function object for many calls.
      params: pytree of real floating arrays; half precision is widened to float32 first.
      data: a batch, which is a mapping of argument names to values, or an iterable of batches that starts afresh
        each time it is gone through. None: the loss needs no arguments.
      mask: the leaves to measure, as for :func:`hessian_trace`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: from a batch to the number of examples that its loss is the mean of, the weight of the batch in
        the data set. None: the length of the leading axis that the arrays of the argument named ``batch`` share, or
        of all arguments if none has that name; :class:`Batches` knows its own.

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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.gradient_norm(mask=mask)


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
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.hessian_vector_product(vector)


def gauss_newton_vector_product(
    loss_fn: Composed,
    params: Any,
    vector: Any,
    data: Data | None = None,
    *,
    example_count: ExampleCount | None = None,
) -> Any:
    r"""The product of the generalized Gauss-Newton matrix with v, :math:`\tfrac1n \sum_i J_i^\top H_i J_i\, v`.

    :math:`J_i` is the derivative of the outputs :math:`f(w, x_i)` by w and :math:`H_i` the Hessian of the loss
    :math:`\ell` by the outputs. It is the Hessian without the curvature of the network itself; it is positive
    semidefinite if :math:`\ell` is convex. For softmax cross-entropy, and for squared error as the likelihood of a
    normal distribution, it is the Fisher information matrix. Costs two gradients and a forward pass with tangents.

    Args:
      loss_fn: a :class:`Composed` loss.
      params: pytree of real floating arrays.
      vector: v, a pytree with the structure and shapes of params.
      data: a batch or an iterable of batches.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.

    Returns:
      A pytree like params, in at least float32.

    Raises:
      TypeError: if the loss is not composed, or as :func:`gradient_norm`.
      ValueError: as :func:`hessian_vector_product`.

    Example:
      The outputs are w², the loss half their square: J = 2w = 6 and H = 1.

      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = curvature.Composed(lambda w: w**2, lambda outputs: 0.5 * outputs**2)
      >>> print(curvature.gauss_newton_vector_product(loss_fn, jnp.array([3.0]), jnp.array([1.0])))
      [36.]

    References:
      Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 14,
      2002; Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 21, 2020.
    """
    objective = Objective(loss_fn, params, data, example_count=example_count)
    return objective.gauss_newton_vector_product(vector)


def empirical_fisher_vector_product(
    loss_fn: Composed,
    params: Any,
    vector: Any,
    data: Data | None = None,
    *,
    example_count: ExampleCount | None = None,
) -> Any:
    r"""The product of the empirical Fisher matrix with v, :math:`\tfrac1n \sum_i g_i g_i^\top v`.

    :math:`g_i` is the gradient of the loss of example i. It is not the Fisher information matrix, which takes the
    labels from the model instead of the data (see :func:`gauss_newton_vector_product`): it also changes with the
    fit of the model, and vanishes where every example is fitted. Costs two gradients and a forward pass with tangents.

    Args:
      loss_fn: a :class:`Composed` loss, whose ``losses_fn`` returns the loss of each example.
      params: pytree of real floating arrays.
      vector: v, a pytree with the structure and shapes of params.
      data: a batch or an iterable of batches.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.

    Returns:
      A pytree like params, in at least float32.

    Raises:
      TypeError: if the loss is not composed, or as :func:`gradient_norm`.
      ValueError: as :func:`hessian_vector_product`.

    Example:
      >>> import jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = curvature.Composed(lambda w, batch: batch @ w, lambda outputs: outputs)
      >>> examples = jnp.array([[2.0, 0.0], [0.0, 4.0]])  # the gradients of the two examples
      >>> print(curvature.empirical_fisher_vector_product(loss_fn, jnp.ones(2), jnp.ones(2), {"batch": examples}))
      [2. 8.]

    References:
      Kunstner, Balles, Hennig, "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent",
      NeurIPS 2019.
    """
    objective = Objective(loss_fn, params, data, example_count=example_count)
    return objective.empirical_fisher_vector_product(vector)
