"""The network, its loss, and a batch to measure with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import models
from experiments.configs import Benchmark
from experiments.models.convnet import ConvNet

LossFn = Callable[..., tuple[jax.Array, Any]]
"""``(params, model_state, images, labels) -> loss, new model state``."""

_CLASSES = 10


def make_loss(config: Benchmark) -> LossFn:
    """The mean cross-entropy of a batch.

    Raises:
      ValueError: if there is no such network.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _network(config)))

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    return loss_fn


def initial(config: Benchmark) -> tuple[Any, Any]:
    """Params, and the network's other state."""
    model = _network(config)
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))


def batch(config: Benchmark) -> dict[str, jax.Array]:
    """Random images, in the network's dtype, and labels."""
    images, labels = jax.random.split(jax.random.key(0))
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    return {
        "images": jax.random.normal(images, shape, jnp.dtype(config.dtype)),
        "labels": jax.random.randint(labels, (config.batch_size,), 0, _CLASSES),
    }


def _network(config: Benchmark) -> nnx.Module:
    options = {} if config.width is None else {"width": config.width}
    if config.model == "convnet":
        if config.dtype != "float32":
            raise ValueError("The ConvNet computes in float32 alone; take another --model for --dtype bfloat16.")
        return ConvNet(3, _CLASSES, **({"width": 32} | options), rngs=nnx.Rngs(0))
    shape = (config.image_size, config.image_size, 3)
    return models.build(config.model, _CLASSES, shape, nnx.Rngs(0), jnp.dtype(config.dtype), **options)
