"""A loss at given parameters over given data, and all that can be measured of it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crsam_jax._checks import check_choice, check_positive, whole_number
from crsam_jax._loss import LossFn
from crsam_jax.ascents import Mask
from crsam_jax.curvature import _quadrature, _vectors
from crsam_jax.curvature._ascend import ascend, check_ascent_arguments, shifted
from crsam_jax.curvature._batches import Data, ExampleCount
from crsam_jax.curvature._estimates import ESTIMATORS, check_precision, estimate, is_precise
from crsam_jax.curvature._lanczos import lanczos
from crsam_jax.curvature._mean_loss import Keep, MeanLoss, Progress, like_params, widened_params
from crsam_jax.curvature._vectors import Vector
from crsam_jax.curvature._xtrace import xtrace
from crsam_jax.curvature.composed import Composed
from crsam_jax.curvature.groups import GroupOf, keep_of, parameter_groups
from crsam_jax.curvature.results import (
    AverageSharpness,
    Eigenpairs,
    Estimate,
    NormalizedTrace,
    Spectrum,
    WorstCaseSharpness,
)

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

MATRICES = ("hessian", "gauss_newton", "empirical_fisher")


class _Operator(NamedTuple):
    """A symmetric matrix over the leaves of params that a measure runs over.

    Attributes:
      product: v -> Av; counts its calls and reports progress.
      like: the leaves.
      size: the number of their elements.
      tree: from a vector to a pytree like params, zero in the other leaves.
    """

    product: _vectors.Product
    like: Vector
    size: int
    tree: Callable[[Vector], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A loss, the parameters it is measured at and the data it is the mean over, said once for all measures.

    The functions of :mod:`crsam_jax.curvature` do the same for a single call; their documentation has the
    formulas, costs and arguments of the methods here. ``dataclasses.replace(objective, params=others)`` measures at
    other parameters.

    Attributes:
      loss_fn: ``loss_fn(params, **batch) -> loss``, a real floating scalar, the mean over the batch's examples; or
        ``(loss, aux)``. Its arguments after params are taken by name. Compiled programs are kept for the 8 losses used
        last, so use the same function object for many calls. A :class:`Composed` loss allows Gauss-Newton
        and Fisher matrices.
      params: pytree of real floating arrays; half precision is widened to float32 first.
      data: a batch, which is a mapping of argument names to values, or an iterable of batches that starts afresh
        each time it is gone through. None: the loss needs no arguments.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: from a batch to the number of examples that its loss is the mean of, the weight of the batch in
        the data set. None: the length of the leading axis that the arrays of the argument named ``batch`` share, or
        of all arguments if none has that name; :class:`Batches` knows its own.

    Raises:
      TypeError: if ``loss_fn`` or ``params`` has the wrong form, or params is traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from crsam_jax import curvature
      >>> objective = curvature.Objective(lambda w: w[0] ** 2 + 2 * w[1] ** 2, jnp.array([1.5, 1.0]))
      >>> objective.value(), objective.gradient_norm()
      (4.25, 5.0)
      >>> objective.hessian_trace(key=jax.random.key(0)).mean
      6.0
    """

    loss_fn: LossFn
    params: Any
    data: Data | None = None
    _: dataclasses.KW_ONLY
    has_aux: bool = False
    example_count: ExampleCount | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", widened_params(self.params))
        self._mean_loss()

    def value(self) -> float:
        """The loss L(w). Costs one loss."""
        return self._mean_loss().value(self.params)

    def gradient(self) -> Any:
        """The gradient ∇L(w), a pytree like params. Costs one gradient."""
        return self._mean_loss().gradient(self.params)

    def gradient_norm(self, *, mask: Mask | None = None) -> float:
        """The norm ‖∇L(w)‖, see :func:`gradient_norm`."""
        return _vectors.norm(self._kept(self.gradient(), keep_of(mask, self.params)))

    def hessian_vector_product(self, vector: Any) -> Any:
        """The product ∇²L(w) v, see :func:`hessian_vector_product`."""
        return self._matrix_vector_product("hessian", vector)

    def gauss_newton_vector_product(self, vector: Any) -> Any:
        """The product of the Gauss-Newton matrix with v, see :func:`gauss_newton_vector_product`."""
        return self._matrix_vector_product("gauss_newton", vector)

    def empirical_fisher_vector_product(self, vector: Any) -> Any:
        """The product of the empirical Fisher matrix with v, see :func:`empirical_fisher_vector_product`."""
        return self._matrix_vector_product("empirical_fisher", vector)

    def hessian_trace(
        self,
        *,
        key: jax.Array,
        num_probes: int = 32,
        estimator: str = "rademacher",
        relative_standard_error: float | None = None,
        matrix: str = "hessian",
        mask: Mask | None = None,
        progress: Progress | None = None,
    ) -> Estimate:
        """The trace, see :func:`hessian_trace`."""
        num_probes = whole_number("num_probes", num_probes, at_least=2)
        check_choice("estimator", estimator, ESTIMATORS)
        check_precision(relative_standard_error)
        keep = keep_of(mask, self.params)
        if estimator == "xtrace":
            if relative_standard_error is not None:
                raise ValueError("relative_standard_error cannot stop XTrace early: omit it, or choose num_probes.")
            size = _vectors.size(self._kept(self.params, keep))
            operator = self._operator(matrix, keep, min(2 * num_probes, size), progress)
            num_probes = min(num_probes, size)
            probes = [_vectors.random_like(k, operator.like) for k in jax.random.split(key, num_probes)]
            mean, variance = xtrace(operator.product, probes)
            return Estimate(mean, math.sqrt(variance), num_probes)
        operator = self._operator(matrix, keep, num_probes, progress)
        samples: list[float] = []
        for probe_key in jax.random.split(key, num_probes):
            samples.append(float(sum(_quadratic_form(operator, probe_key, estimator))))
            if is_precise(samples, relative_standard_error):
                break
        return estimate(samples)

    def hessian_trace_by_group(
        self,
        *,
        key: jax.Array,
        group_of: GroupOf | None = None,
        num_probes: int = 32,
        matrix: str = "hessian",
        progress: Progress | None = None,
    ) -> dict[str, Estimate]:
        """The trace of each layer's diagonal block, see :func:`hessian_trace_by_group`."""
        num_probes = whole_number("num_probes", num_probes, at_least=2)
        groups = {name: keep_of(mask, self.params) for name, mask in parameter_groups(self.params, group_of).items()}
        keep = tuple(map(any, zip(*groups.values(), strict=True)))
        operator = self._operator(matrix, keep, num_probes, progress)
        forms = [_quadratic_form(operator, k, "rademacher") for k in jax.random.split(key, num_probes)]
        members = {name: [m for m, k in zip(kept, keep, strict=True) if k] for name, kept in groups.items()}
        return {name: estimate(np.array(forms)[:, chosen].sum(axis=1)) for name, chosen in members.items()}

    def normalized_hessian_trace(
        self,
        *,
        key: jax.Array,
        num_probes: int = 32,
        estimator: str = "rademacher",
        relative_standard_error: float | None = None,
        progress: Progress | None = None,
    ) -> NormalizedTrace:
        """The paper's Tr ∇²L(w)/‖∇L(w)‖, see :func:`normalized_hessian_trace`."""
        trace = self.hessian_trace(
            key=key,
            num_probes=num_probes,
            estimator=estimator,
            relative_standard_error=relative_standard_error,
            progress=progress,
        )
        norm = self.gradient_norm()
        with np.errstate(divide="ignore", invalid="ignore"):
            mean, error = np.array([trace.mean, trace.standard_error]) / norm
        return NormalizedTrace(float(mean), float(error), trace, norm)

    def top_eigenvalues(
        self,
        *,
        key: jax.Array,
        num_eigenvalues: int = 1,
        num_steps: int | None = None,
        matrix: str = "hessian",
        mask: Mask | None = None,
        progress: Progress | None = None,
    ) -> Eigenpairs:
        """The largest eigenvalues, see :func:`top_eigenvalues`."""
        return self._eigenpairs(True, key, num_eigenvalues, num_steps, matrix, mask, progress)

    def smallest_eigenvalues(
        self,
        *,
        key: jax.Array,
        num_eigenvalues: int = 1,
        num_steps: int | None = None,
        matrix: str = "hessian",
        mask: Mask | None = None,
        progress: Progress | None = None,
    ) -> Eigenpairs:
        """The smallest eigenvalues, see :func:`smallest_eigenvalues`."""
        return self._eigenpairs(False, key, num_eigenvalues, num_steps, matrix, mask, progress)

    def hessian_spectrum(
        self,
        *,
        key: jax.Array,
        num_probes: int = 8,
        num_steps: int | None = None,
        grid: Any = 1000,
        width: float | None = None,
        matrix: str = "hessian",
        mask: Mask | None = None,
        progress: Progress | None = None,
    ) -> Spectrum:
        """The density of eigenvalues, see :func:`hessian_spectrum`."""
        num_probes = whole_number("num_probes", num_probes, at_least=2)
        grid = _quadrature.checked_grid(grid)
        _quadrature.check_width(width)
        keep = keep_of(mask, self.params)
        size = _vectors.size(self._kept(self.params, keep))
        num_steps = _checked_steps(min(40, size) if num_steps is None else num_steps, size, at_least=1)
        operator = self._operator(matrix, keep, num_probes * num_steps, progress)
        keys = jax.random.split(key, num_probes)
        krylovs = (lanczos(operator.product, _vectors.random_like(k, operator.like), num_steps) for k in keys)
        nodes, weights = _quadrature.quadrature(krylovs, num_steps)
        return _quadrature.smoothed(nodes, weights, grid, width, size)

    def worst_case_sharpness(
        self,
        *,
        rho: float,
        num_steps: int = 20,
        step_size: float | None = None,
        adaptive: bool = False,
        key: jax.Array | None = None,
        progress: Progress | None = None,
    ) -> WorstCaseSharpness:
        """The largest rise of the loss in a ball, see :func:`worst_case_sharpness`."""
        num_steps = check_ascent_arguments(rho, num_steps, step_size)
        loss, scale = self._mean_loss(), self._scale(adaptive)
        losses: list[float] = []

        def seen(value: float) -> None:
            losses.append(value)
            if progress is not None:
                progress(len(losses), num_steps + 1)

        def gradient_at(offset: Any) -> Any:
            value, gradient = loss.value_and_grad(shifted(self.params, _scaled(scale, offset)))
            if not losses and _vectors.norm(gradient) == 0:
                gradient = self._random(jax.random.key(0) if key is None else key)
            seen(value)
            return _scaled(scale, gradient)

        offset = ascend(gradient_at, jax.tree.map(jnp.zeros_like, self.params), rho, num_steps, step_size)
        seen(loss.value(shifted(self.params, _scaled(scale, offset))))
        path = np.array(losses)
        return WorstCaseSharpness(float(np.max(path) - path[0]), path)

    def average_sharpness(
        self,
        *,
        sigma: float,
        key: jax.Array,
        num_probes: int = 32,
        relative_standard_error: float | None = None,
        adaptive: bool = False,
        progress: Progress | None = None,
    ) -> AverageSharpness:
        """The mean rise of the loss under Gaussian noise, see :func:`average_sharpness`."""
        check_positive("sigma", sigma)
        num_probes = whole_number("num_probes", num_probes, at_least=2)
        check_precision(relative_standard_error)
        loss, scale = self._mean_loss(), self._scale(adaptive)
        center = loss.value(self.params)
        rises: list[float] = []
        for probe_key in jax.random.split(key, num_probes):
            noise = _scaled(scale, self._random(probe_key))
            pair = [loss.value(shifted(self.params, _times(sign * sigma, noise))) for sign in (1, -1)]
            rises.append(sum(pair) / 2 - center)
            if progress is not None:
                progress(len(rises), num_probes)
            if is_precise(rises, relative_standard_error):
                break
        result = estimate(rises)
        return AverageSharpness(*result, loss=center)

    def _mean_loss(self) -> MeanLoss:
        return MeanLoss(self.loss_fn, self.data, self.has_aux, self.example_count)

    def _matrix_vector_product(self, matrix: str, vector: Any) -> Any:
        vector = like_params("vector", vector, self.params)
        operator = self._operator(matrix, keep_of(None, self.params), 1, None)
        return operator.tree(operator.product(tuple(jax.tree.leaves(vector))))

    def _eigenpairs(
        self,
        is_largest: bool,
        key: jax.Array,
        num_eigenvalues: int,
        num_steps: int | None,
        matrix: str,
        mask: Mask | None,
        progress: Progress | None,
    ) -> Eigenpairs:
        count = whole_number("num_eigenvalues", num_eigenvalues, at_least=1)
        keep = keep_of(mask, self.params)
        size = _vectors.size(self._kept(self.params, keep))
        num_steps = _checked_steps(min(20 + 5 * count, size) if num_steps is None else num_steps, size, at_least=count)
        operator = self._operator(matrix, keep, num_steps + count, progress)
        krylov = lanczos(operator.product, _vectors.random_like(key, operator.like), num_steps)
        if len(krylov.values) < count:
            raise ValueError(
                f"num_eigenvalues is {count}, but the matrix has only {len(krylov.values)} distinct eigenvalues "
                "up to rounding; ask for fewer."
            )
        order = slice(None, None, -1) if is_largest else slice(None)
        values = krylov.values[order][:count]
        vectors = [_vectors.unit(krylov.basis.combination(column)) for column in krylov.coordinates[:, order].T[:count]]
        residuals = [
            _vectors.norm(_vectors.residual(operator.product(vector), krylov.exponent, value, vector))
            for value, vector in zip(values, vectors, strict=True)
        ]
        values, lengths = (np.ldexp(numbers, krylov.exponent) for numbers in (values, np.array(residuals)))
        return Eigenpairs(values, lengths, [operator.tree(vector) for vector in vectors])

    def _operator(self, matrix: str, keep: Keep, total: int, progress: Progress | None) -> _Operator:
        check_choice("matrix", matrix, MATRICES)
        if matrix != "hessian" and not isinstance(self.loss_fn, Composed):
            raise TypeError(
                f'matrix="{matrix}" needs the loss in two parts: pass '
                "crsam_jax.curvature.Composed(outputs_fn, losses_fn) as loss_fn."
            )
        loss = self._mean_loss()
        products = {"hessian": loss.hvp, "gauss_newton": loss.gnvp, "empirical_fisher": loss.efvp}
        done = 0

        def product(vector: Vector) -> Vector:
            nonlocal done
            result: Vector = jax.block_until_ready(products[matrix](self.params, vector, keep))
            done += 1
            if progress is not None:
                progress(done, total)
            return result

        def tree(vector: Vector) -> Any:
            kept = iter(vector)
            leaves, structure = jax.tree.flatten(self.params)
            pairs = zip(leaves, keep, strict=True)
            return jax.tree.unflatten(structure, [next(kept) if k else jnp.zeros_like(leaf) for leaf, k in pairs])

        like = self._kept(self.params, keep)
        return _Operator(product, like, _vectors.size(like), tree)

    def _kept(self, tree: Any, keep: Keep) -> Vector:
        return tuple(leaf for leaf, kept in zip(jax.tree.leaves(tree), keep, strict=True) if kept)

    def _random(self, key: jax.Array) -> Any:
        leaves, structure = jax.tree.flatten(self.params)
        return jax.tree.unflatten(structure, _vectors.random_like(key, tuple(leaves)))

    def _scale(self, adaptive: bool) -> Any:
        """The diagonal of T; None for the identity."""
        return jax.tree.map(jnp.abs, self.params) if adaptive else None


def _quadratic_form(operator: _Operator, key: jax.Array, estimator: str) -> Array:
    """The form zᵀAz of a random z, [leaves]: the part of each leaf."""
    sampler = jax.random.rademacher if estimator == "rademacher" else jax.random.normal
    probe = _vectors.random_like(key, operator.like, sampler)
    return np.asarray(_vectors.dots_by_leaf(probe, operator.product(probe)), np.float64)


def _checked_steps(num_steps: int, size: int, *, at_least: int) -> int:
    num_steps = whole_number("num_steps", num_steps, at_least=at_least)
    if num_steps > size:
        raise ValueError(f"num_steps is {num_steps}, but there are only {size} parameters to take steps in.")
    return num_steps


def _scaled(scale: Any, tree: Any) -> Any:
    return tree if scale is None else jax.tree.map(jnp.multiply, scale, tree)


def _times(factor: float, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: factor * leaf, tree)
