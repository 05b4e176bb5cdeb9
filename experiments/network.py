"""The network of a recipe, the loss that it is trained on, and its logits in evaluation mode."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import models
from experiments.inputs import Signature
from experiments.models.convnet import ConvNet
from experiments.recipes import Recipe

LossFn = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Network(NamedTuple):
    """Functions of params and model state, which is all that is no parameter: BatchNorm's statistics.

    Attributes:
      init: from a seed to params and model state.
      loss_fn: in training mode, ``(params, model_state, images, labels) -> loss, (new model state, right answers)``.
      logits: in evaluation mode, with stored statistics, ``(params, model_state, images) -> logits``.
    """

    init: Callable[[int | jax.Array], tuple[Any, Any]]
    loss_fn: LossFn
    logits: Callable[[Any, Any, jax.Array], jax.Array]


def make_network(recipe: Recipe, signature: Signature, groups: int = 1) -> Network:
    """Builds the network of a recipe.

    Args:
      recipe: which one, and in how many parts a batch passes it.
      signature: shapes of its data.
      groups: parts of a batch, each with BatchNorm statistics of its own, that pass together: as many as devices.
    """
    make_model = partial(_make_model, recipe, signature)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(0)))

    def init(seed: int | jax.Array) -> tuple[Any, Any]:
        model = make_model(seed)
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.train()
        logits = model(images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), jnp.sum(jnp.argmax(logits, -1) == labels))

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.eval()
        return model(images)

    return Network(init, _mean_over_sequence(_mean_over_groups(loss_fn, groups), recipe.accumulate), logits)


def _make_model(recipe: Recipe, signature: Signature, seed: int | jax.Array) -> nnx.Module:
    shape, rngs, options = signature.image_shape, nnx.Rngs(jax.random.key(seed)), dict[str, Any](recipe.model_options)
    if recipe.model == "convnet":
        models.check_options("convnet", ConvNet, options)
        if recipe.dtype != "float32":
            raise ValueError(f"The convnet computes in float32 alone: take another network for --dtype {recipe.dtype}.")
        return ConvNet(shape[-1], signature.num_classes, **options, rngs=rngs)
    dtype = jnp.dtype(recipe.dtype)
    return models.build(recipe.model, signature.num_classes, shape, rngs, dtype, **options)


def _mean_over_groups(loss_fn: LossFn, groups: int) -> LossFn:
    """The mean over parts of a batch that pass the network together."""
    if groups == 1:
        return loss_fn

    def loss_of_groups(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        parts = (x.reshape(groups, -1, *x.shape[1:]) for x in (images, labels))
        losses, (states, correct) = jax.vmap(loss_fn, in_axes=(None, None, 0, 0))(params, model_state, *parts)
        return jnp.mean(losses), (_mean(states), jnp.sum(correct))

    return loss_of_groups


def _mean_over_sequence(loss_fn: LossFn, count: int) -> LossFn:
    """The mean over parts that pass one after the other, for the memory of one, with examples from every device each.

    Their activations are computed again in the backward pass. It is one function of the whole batch, and so its
    perturbation is.
    """
    if count == 1:
        return loss_fn

    def loss_of_sequence(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        @jax.checkpoint
        def of_part(part: Any) -> tuple[jax.Array, Any]:
            return loss_fn(params, model_state, *part)

        # Every count-th example, so that each device keeps what it has.
        parts = tuple(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for x in (images, labels))
        losses, (states, correct) = jax.lax.map(of_part, parts)
        return jnp.mean(losses), (_mean(states), jnp.sum(correct))

    return loss_of_sequence


def _mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
