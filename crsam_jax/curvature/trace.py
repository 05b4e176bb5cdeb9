"""The Hessian's trace, with its standard error, as a whole and by layer, and the paper's normalized trace."""

from typing import Any

import jax

from crsam_jax._loss import LossFn
from crsam_jax.ascents import Mask
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._mean_loss import Progress
from crsam_jax.curvature.groups import GroupOf
from crsam_jax.curvature.objective import Objective
from crsam_jax.curvature.results import Estimate, NormalizedTrace


def hessian_trace(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_probes: int = 32,
    estimator: str = "rademacher",
    relative_standard_error: float | None = None,
    matrix: str = "hessian",
    mask: Mask | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> Estimate:
    r"""The trace of the Hessian, :math:`\operatorname{Tr} \nabla^2 L(w) = \mathbb{E}_z\, z^\top \nabla^2 L(w)\, z`.

    z has independent entries of mean 0 and variance 1. Costs one matrix-vector product per probe, two with XTrace.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays, n numbers in all.
      data: a batch or an iterable of batches.
      key: a JAX random key; the same key gives the same probes.
      num_probes: how many probes, at least 2; with ``relative_standard_error`` the most that are spent.
      estimator: ``"rademacher"``: signs, the least variance of the plain estimators for large n; ``"gaussian"``: normal
        entries; ``"xtrace"``: Gaussian probes that also span a low-rank approximation, whose trace is taken
        exactly. XTrace's error falls faster where few eigenvalues dominate. It holds 4 ``num_probes`` vectors of n
        numbers, and from ``2 num_probes >= n`` on it sums up the diagonal: the error is then 0. All its probes share
        one approximation, and the standard error allows for that. It is rather too large, by a factor of about two,
        where each eigenvalue is half the one before.
      relative_standard_error: stop once standard error/\|mean\| is at most this; looked at after each probe
        from the tenth on. Not with XTrace, whose probes act together. Stopping on an error favours errors that came
        out small: the true one is some 1.2 times larger if it stops at about twenty probes, hardly so at a hundred
        and more. None: spend all probes.
      matrix: ``"hessian"``; with a :class:`Composed` loss also ``"gauss_newton"``, see
        :func:`gauss_newton_vector_product`, and ``"empirical_fisher"``, see :func:`empirical_fisher_vector_product`.
      mask: the leaves to measure, that is the diagonal block of the matrix: a pytree of bools that is a prefix of
        params, or a function from params to one; see :func:`parameter_groups`. None: all leaves.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each matrix-vector product, that is each pass over data.

    Returns:
      An :class:`Estimate`. The error is that of random probes; it does not cover the choice of the data.

    Raises:
      TypeError, ValueError: as :func:`gradient_norm`, or for a bad number or name.

    Example:
      Rademacher probes are exact on a diagonal Hessian:

      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> curvature.hessian_trace(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0]), key=jax.random.key(0), num_probes=4)
      Estimate(mean=60.0, standard_error=0.0, num_probes=4)

    References:
      Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
      splines", 1989; Epperly, Tropp, Webber, "XTrace", SIAM J. Matrix Anal. Appl. 45, 2024.
    """
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.hessian_trace(
        key=key,
        num_probes=num_probes,
        estimator=estimator,
        relative_standard_error=relative_standard_error,
        matrix=matrix,
        mask=mask,
        progress=progress,
    )


def hessian_trace_by_group(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    group_of: GroupOf | None = None,
    num_probes: int = 32,
    matrix: str = "hessian",
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> dict[str, Estimate]:
    r"""The trace of each layer's diagonal block, :math:`\mathbb{E}_z\, z_g^\top (\nabla^2 L(w)\, z)_g`.

    g is the group, z random signs. The traces of all groups add up to the trace of the whole. One set of probes
    serves all groups: costs one matrix-vector product per probe, however many groups there are.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches.
      key: a JAX random key.
      group_of: from a leaf's path to the name of its group, as for :func:`parameter_groups`; by default a layer.
      num_probes: how many probes, at least 2.
      matrix: ``"hessian"``, ``"gauss_newton"`` or ``"empirical_fisher"``, as for :func:`hessian_trace`.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch, as for :func:`gradient_norm`.
      progress: called as ``progress(done, total)`` after each matrix-vector product.

    Returns:
      A dict from the name of a group to its :class:`Estimate`; :func:`plot_by_group` draws it. The errors of groups are
      correlated, as they share their probes.

    Raises:
      TypeError, ValueError: as :func:`hessian_trace`, or if there is no group.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda params: jnp.sum(params["first"]["w"] ** 2) + 5 * params["second"]["w"] ** 2
      >>> params = {"first": {"w": jnp.ones(3)}, "second": {"w": jnp.ones(())}}
      >>> traces = curvature.hessian_trace_by_group(loss_fn, params, key=jax.random.key(0))
      >>> {name: trace.mean for name, trace in traces.items()}
      {'first': 6.0, 'second': 10.0}

    References:
      Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian", IEEE Big Data 2020.
    """
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.hessian_trace_by_group(
        key=key,
        group_of=group_of,
        num_probes=num_probes,
        matrix=matrix,
        progress=progress,
    )


def normalized_hessian_trace(
    loss_fn: LossFn,
    params: Any,
    data: Data | None = None,
    *,
    key: jax.Array,
    num_probes: int = 32,
    estimator: str = "rademacher",
    relative_standard_error: float | None = None,
    has_aux: bool = False,
    example_count: ExampleCount | None = None,
    progress: Progress | None = None,
) -> NormalizedTrace:
    r"""The paper's normalized Hessian trace, :math:`C(w) = \operatorname{Tr} \nabla^2 L(w) / \|\nabla L(w)\|`.

    It has the unit of 1/‖w‖. Costs :func:`hessian_trace` and one gradient.

    Args:
      loss_fn: ``loss_fn(params, **batch) -> loss``, as for :func:`gradient_norm`.
      params: pytree of real floating arrays.
      data: a batch or an iterable of batches.
      key: a JAX random key.
      num_probes: how many probes at most, at least 2.
      estimator: ``"rademacher"``, ``"gaussian"`` or ``"xtrace"``.
      relative_standard_error: stop early at this relative standard error.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the number of examples of a batch.
      progress: called as ``progress(done, total)`` after each Hessian-vector product.

    Returns:
      A :class:`NormalizedTrace`.

    Raises:
      TypeError, ValueError: as :func:`hessian_trace`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> result = curvature.normalized_hessian_trace(loss_fn, jnp.array([3.0, 4.0]), key=jax.random.key(0))
      >>> result.mean, result.gradient_norm  # 2/5
      (0.4, 5.0)

    References:
      Wu et al., "CR-SAM", AAAI 2024, eq. 4.
    """
    objective = Objective(loss_fn, params, data, has_aux=has_aux, example_count=example_count)
    return objective.normalized_hessian_trace(
        key=key,
        num_probes=num_probes,
        estimator=estimator,
        relative_standard_error=relative_standard_error,
        progress=progress,
    )
