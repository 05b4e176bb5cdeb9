"""A small network with its dense Hessian, and ways to cut its data into batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.core.problems import mlp, mlp_loss


class DenseCase(NamedTuple):
    params: Any
    batch: Any
    gradient: np.ndarray
    hessian: np.ndarray
    eigenvalues: np.ndarray  # descending


def dense_case(seed: int = 0, examples: int = 32) -> DenseCase:
    """The network in the float dtype of the moment, and its derivatives by brute force."""
    _, params, batch = mlp(seed, examples, dtype=jnp.result_type(float))
    vector, unravel = ravel_pytree(params)
    flat_loss = lambda w: mlp_loss(unravel(w), batch)
    hessian = np.asarray(jax.jit(jax.hessian(flat_loss))(vector))
    gradient = np.asarray(jax.jit(jax.grad(flat_loss))(vector))
    return DenseCase(params, batch, gradient, hessian, np.linalg.eigvalsh(hessian)[::-1])


def cut(batch: Any, sizes: list[int]) -> list[dict[str, Any]]:
    """The batch as a data set of batches with the given sizes."""
    ends = np.cumsum(sizes)
    assert ends[-1] == len(batch[1])
    return [
        {"batch": jax.tree.map(lambda leaf: leaf[end - size : end], batch)}
        for size, end in zip(sizes, ends, strict=True)
    ]


def example_losses(params: Any, batch: Any) -> jax.Array:
    """The loss of each example of :func:`tests.core.problems.mlp_loss`."""
    x, labels = batch
    one = lambda x, label: mlp_loss(params, (x[None], label[None]))
    return jax.vmap(one)(x, labels)


def normal_like(key: Any, params: Any) -> Any:
    """Gaussian numbers, a key for each leaf."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )
