"""The mean loss over a data set, with its gradient and matrices, one batch in memory at a time.

The loop over batches runs in Python and each batch's work is one compiled program. That streams from any
iterable, takes batches of any sizes, and on CPU it is far faster than a compiled loop, inside which
convolutions leave XLA's fast path.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from crsam_jax import _trees as trees
from crsam_jax._checks import brief
from crsam_jax._loss import LossBinder, LossFn
from crsam_jax._trees import check_params
from crsam_jax.curvature import _vectors
from crsam_jax.curvature._batches import Data, ExampleCount, Passes
from crsam_jax.curvature._vectors import Vector
from crsam_jax.curvature.composed import Composed

Progress = Callable[[int, int | None], Any]
"""``progress(done, total)``; ``total`` is None where it is not known beforehand."""

Keep = tuple[bool, ...]
"""For each leaf of params whether a measure runs over it."""

# Compiled programs, and with them what the loss closes over, are kept for this many losses.
_RECENT = 8


def per_loss(kernel: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """From (loss_fn, has_aux) to ``kernel(loss_fn, has_aux, *args, **static)``, compiled, for the most recent losses.

    Its argument ``keep``, if it has one, is static. A kernel compiled with the loss as a static argument would keep
    every loss alive, with the arrays it closes over.
    """
    static = [name for name in ("keep",) if name in inspect.signature(kernel).parameters]

    @functools.lru_cache(maxsize=_RECENT)
    def compiled(loss_fn: LossFn, has_aux: bool) -> Callable[..., Any]:
        return jax.jit(functools.partial(kernel, loss_fn, has_aux), static_argnames=static)

    return compiled


class MeanLoss:
    r"""L(w) = Σ_b n_b L_b(w) / Σ_b n_b over the batches b, n_b examples each; exact, whatever their sizes.

    Args:
      loss_fn: mean loss of a batch, ``loss_fn(params, **batch) -> loss`` or ``(loss, aux)``.
      data: one batch, or an iterable of batches; None for a loss of params alone.
      has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
      example_count: the weight n_b of a batch; None reads it off the arrays.
    """

    def __init__(self, loss_fn: LossFn, data: Data | None, has_aux: bool, example_count: ExampleCount | None):
        binder(loss_fn, has_aux)  # reports a bad loss_fn before any work is done
        self._loss = (loss_fn, has_aux)
        self._data: Data = {} if data is None else data
        self._passes = Passes(self._data, example_count)

    def value(self, params: Any) -> float:
        """The loss L(w)."""
        return float(self.mean(_value(*self._loss), params))

    def value_and_grad(self, params: Any) -> tuple[float, Any]:
        """The loss L(w) and its gradient ∇L(w)."""
        value, gradient = self.mean(_value_and_grad(*self._loss), params)
        return float(value), gradient

    def gradient(self, params: Any) -> Any:
        """The gradient ∇L(w)."""
        return self.value_and_grad(params)[1]

    def hvp(self, params: Any, vector: Vector, keep: Keep) -> Vector:
        """The product ∇²L(w) v, by forward over reverse differentiation, in the leaves that ``keep`` names."""
        return self.mean(functools.partial(_hvp(*self._loss), keep=keep), params, vector)

    def gnvp(self, params: Any, vector: Vector, keep: Keep) -> Vector:
        """The product of the Gauss-Newton matrix with v, in the leaves that ``keep`` names."""
        return self.mean(functools.partial(_gnvp(*self._loss), keep=keep), params, vector)

    def efvp(self, params: Any, vector: Vector, keep: Keep) -> Vector:
        """The product of the empirical Fisher matrix with v, in the leaves that ``keep`` names."""
        return self.mean(functools.partial(_efvp(*self._loss), keep=keep), params, vector)

    def mean(self, kernel: Callable[..., Any], *args: Any) -> Any:
        """The mean over examples of ``kernel(*args, batch)``, a pytree, in one pass.

        A batch of weight 0 is not evaluated: it contributes nothing, even where its mean is 0/0.
        """
        if isinstance(self._data, Mapping):  # one batch needs no weight
            return trees.widen(kernel(*args, dict(self._data)))
        total, weights = None, 0.0
        for batch, weight in self._passes:
            if weight == 0:
                continue
            value = kernel(*args, dict(batch))
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
    """``tree``, checked to have the structure and shapes of params, in its dtypes and shardings.

    Raises:
      ValueError: naming the place, if it does not fit.
    """
    found: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if found != expected:
        raise ValueError(f"{name} must have the tree structure of params, {brief(expected)}; got {brief(found)}.")
    for (path, leaf), param in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(param):
            where = jax.tree_util.keystr(path) or "the root"
            raise ValueError(f"{name} has shape {jnp.shape(leaf)} at {where} where params has {jnp.shape(param)}.")
    return jax.tree.map(_vectors.placed_like, trees.cast_like(jax.tree.map(jnp.asarray, tree), params), params)


def binder(loss_fn: LossFn, has_aux: bool) -> LossBinder:
    """Takes the arguments of ``loss_fn`` from a batch."""
    return LossBinder(loss_fn, has_aux, call="data=dict({})")


@per_loss
def _value(loss_fn: LossFn, has_aux: bool, params: Any, batch: Any) -> jax.Array:
    return binder(loss_fn, has_aux)(batch)(params)


@per_loss
def _value_and_grad(loss_fn: LossFn, has_aux: bool, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(binder(loss_fn, has_aux)(batch))(params)


@per_loss
def _hvp(loss_fn: LossFn, has_aux: bool, params: Any, vector: Vector, batch: Any, *, keep: Keep) -> Vector:
    kept, of_kept = _restricted(binder(loss_fn, has_aux)(batch), params, keep)
    product: Vector = jax.jvp(jax.grad(of_kept), (kept,), (vector,))[1]
    return product


@per_loss
def _gnvp(loss_fn: Composed, has_aux: bool, params: Any, vector: Vector, batch: Any, *, keep: Keep) -> Vector:
    del has_aux
    kept, outputs_fn = _restricted(lambda params: loss_fn.outputs(params, batch), params, keep)
    outputs, moved = jax.jvp(outputs_fn, (kept,), (vector,))
    _, curved = jax.jvp(jax.grad(lambda outputs: loss_fn.mean_loss(outputs, batch)), (outputs,), (moved,))
    product: Vector = jax.vjp(outputs_fn, kept)[1](curved)[0]
    return product


@per_loss
def _efvp(loss_fn: Composed, has_aux: bool, params: Any, vector: Vector, batch: Any, *, keep: Keep) -> Vector:
    del has_aux
    kept, losses_fn = _restricted(lambda params: loss_fn.example_losses(params, **batch), params, keep)
    losses, slopes = jax.jvp(losses_fn, (kept,), (vector,))
    product: Vector = jax.vjp(losses_fn, kept)[1](slopes / losses.size)[0]
    return product


def _restricted(function: Callable[[Any], Any], params: Any, keep: Keep) -> tuple[Vector, Callable[[Vector], Any]]:
    """The leaves that are kept, and ``function`` as a function of them alone."""
    leaves, structure = jax.tree.flatten(params)

    def of_kept(kept: Vector) -> Any:
        given = iter(kept)
        whole = [next(given) if k else leaf for k, leaf in zip(keep, leaves, strict=True)]
        return function(jax.tree.unflatten(structure, whole))

    return tuple(leaf for k, leaf in zip(keep, leaves, strict=True) if k), of_kept


@jax.jit
def _accumulated(total: Any, value: Any, weight: Any) -> Any:
    weighted = trees.wide_map(lambda leaf: weight * leaf, value)
    return weighted if total is None else jax.tree.map(jnp.add, total, weighted)
