"""The mean loss over a data set, with its gradient and Hessian, one batch in memory at a time.

The loop over batches runs in Python and each batch's work is one compiled program. That streams from any
iterable, takes batches of any sizes, and on CPU it is far faster than a compiled loop, inside which
convolutions leave XLA's fast path.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax import _trees as trees
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax._trees import check_params
from crsam_jax.curvature._batches import Data, ExampleCount, count_examples, iterate

Progress = Callable[[int, int | None], Any]
"""``progress(done, total)``; ``total`` is None where it is not known beforehand."""


class MeanLoss:
    r"""L(w) = Σ_b n_b L_b(w) / Σ_b n_b over the batches b, n_b examples each; exact, whatever their sizes.

    Args:
      loss_fn: mean loss of a batch, ``loss_fn(params, **batch) -> loss`` or ``(loss, aux)``.
      data: one batch, or an iterable of batches; None for a loss of params alone.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the weight n_b of a batch; None reads it off the arrays.
    """

    def __init__(self, loss_fn: LossFn, data: Data | None, has_aux: bool, example_count: ExampleCount | None):
        _binder(loss_fn, has_aux)  # reports a bad loss_fn before any work is done
        self._settings = {"loss_fn": loss_fn, "has_aux": has_aux}
        self._data: Data = {} if data is None else data
        self._example_count = example_count

    def value(self, params: Any) -> float:
        """The loss L(w)."""
        return float(self.mean(_value, params))

    def value_and_grad(self, params: Any) -> tuple[float, Any]:
        """The loss L(w) and its gradient ∇L(w)."""
        value, gradient = self.mean(_value_and_grad, params)
        return float(value), gradient

    def gradient(self, params: Any) -> Any:
        """The gradient ∇L(w)."""
        return self.value_and_grad(params)[1]

    def hvp(self, params: Any, vector: Any) -> Any:
        """The product ∇²L(w) v, by forward over reverse differentiation."""
        return self.mean(_hvp, params, vector)

    def mean(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """The mean over examples of ``kernel(*args, batch, loss_fn=..., has_aux=...)``, a pytree, in one pass."""
        if isinstance(self._data, Mapping):  # one batch needs no weight
            return trees.widen(kernel(*args, dict(self._data), **self._settings))
        total, weights = None, 0.0
        for batch in iterate(self._data):
            weight = count_examples(self._data, batch, self._example_count)
            value = kernel(*args, dict(batch), **self._settings)
            jax.block_until_ready(total)  # so that no more than two batches are in memory
            total = _accumulated(total, value, weight)
            weights += weight
        if weights == 0:
            raise ValueError("data holds no example: every batch counts as 0.")
        return jax.tree.map(lambda leaf: leaf / weights, total)


def widened_params(params: Any) -> Any:
    """Params, checked, with every leaf in at least float32: what is measured is measured there.

    Raises:
      TypeError: if a leaf is not real and floating, or is traced: the loops over data and probes run in Python.
    """
    check_params(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise TypeError("params is traced: this function loops in Python, call it outside of jit, grad, vmap and scan.")
    return trees.widen(params)


def like_params(name: str, tree: Any, params: Any) -> Any:
    """``tree``, checked to have the structure and shapes of params, in its dtypes.

    Raises:
      ValueError: naming the place, if it does not fit.
    """
    found: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(f"{name} must have the tree structure of params, {expected}; got {found}.")
    for (path, leaf), param in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(param):
            where = jax.tree_util.keystr(path) or "the root"
            raise ValueError(f"{name} has shape {jnp.shape(leaf)} at {where} where params has {jnp.shape(param)}.")
    return trees.cast_like(jax.tree.map(jnp.asarray, tree), params)


def _binder(loss_fn: LossFn, has_aux: bool) -> LossBinder:
    return LossBinder(loss_fn, has_aux, call="data=dict({})")


_per_batch = functools.partial(jax.jit, static_argnames=("loss_fn", "has_aux"))


@_per_batch
def _value(params: Any, batch: Any, *, loss_fn: LossFn, has_aux: bool) -> jax.Array:
    return _binder(loss_fn, has_aux)(batch)(params)


@_per_batch
def _value_and_grad(params: Any, batch: Any, *, loss_fn: LossFn, has_aux: bool) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(_binder(loss_fn, has_aux)(batch))(params)


@_per_batch
def _hvp(params: Any, vector: Any, batch: Any, *, loss_fn: LossFn, has_aux: bool) -> Any:
    return jax.jvp(jax.grad(_binder(loss_fn, has_aux)(batch)), (params,), (vector,))[1]


@jax.jit
def _accumulated(total: Any, value: Any, weight: Any) -> Any:
    weighted = trees.wide_map(lambda leaf: weight * leaf, value)
    return weighted if total is None else jax.tree.map(jnp.add, total, weighted)
