"""matfree's algorithms over a matrix that only a Python function knows.

matfree compiles its loops, and so traces the matrix-vector product. A product over a data set is a Python loop
that cannot be traced, and callbacks into JAX from a compiled program may deadlock. So matfree runs eagerly
here, operation by operation, and sees the product as one opaque linear primitive; the product itself
stays compiled. The cost is some milliseconds a product, little against a gradient over data.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

Product = Callable[[jax.Array], jax.Array]
"""v -> Av for vectors of shape [n]."""


def load(module: str) -> Any:
    """The module ``matfree.<module>``, imported when it is needed.

    Raises:
      ImportError: if matfree is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(f"matfree.{module}")
    except ImportError as error:
        raise ImportError(
            'crsam_jax.curvature needs matfree for stochastic linear algebra: pip install "crsam_jax[curvature]".'
        ) from error


def run_eagerly(algorithm: Callable[..., Any], product: Product, *args: Any) -> Any:
    """``algorithm(product, *args)``, which may trace, batch and push forward through ``product``."""
    disabled = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # a flag with a context manager

    def restored(vector: jax.Array) -> jax.Array:
        with jax.disable_jit(disabled):
            return product(vector)

    with jax.disable_jit():
        return algorithm(lambda vector: _product_p.bind(vector, product=restored), *args)


_product_p = Primitive("crsam_jax_product")


@_product_p.def_impl  # type: ignore[untyped-decorator]
def _run(vector: jax.Array, *, product: Product) -> jax.Array:
    return product(vector)


@_product_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract(vector: Any, *, product: Product) -> Any:
    del product
    return vector


def _batched(vectors: Sequence[Any], axes: Sequence[Any], *, product: Product) -> tuple[jax.Array, int]:
    columns = jnp.moveaxis(vectors[0], axes[0], 0)
    return jnp.stack([_product_p.bind(column, product=product) for column in columns]), 0


def _pushed_forward(vectors: Sequence[Any], tangents: Sequence[Any], *, product: Product) -> tuple[Any, Any]:
    """The derivative of the product, which is the product itself, since it is linear."""
    primal = _product_p.bind(vectors[0], product=product)
    if isinstance(tangents[0], ad.Zero):
        return primal, tangents[0]
    return primal, _product_p.bind(tangents[0], product=product)


batching.primitive_batchers[_product_p] = _batched
ad.primitive_jvps[_product_p] = _pushed_forward
