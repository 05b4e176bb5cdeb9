"""The network of a recipe, the loss that it is trained on, and its logits in evaluation mode."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments import models, python_files
from experiments.inputs import Signature
from experiments.recipes import Recipe
from experiments.sources import in_python_file

LossFn = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""``(params, model_state, images, labels) -> loss, (new model state, right answers)``."""


class Network(NamedTuple):
    """Functions of params and model state: BatchNorm's statistics.

    Attributes:
      init: from a seed to params and model state.
      loss_fn: in training mode.
      logits: in evaluation mode, with stored statistics, ``(params, model_state, images) -> logits``.
    """

    init: Callable[[int | jax.Array], tuple[Any, Any]]
    loss_fn: LossFn
    logits: Callable[[Any, Any, jax.Array], jax.Array]


def make_network(recipe: Recipe, signature: Signature, groups: int = 1) -> Network:
    """Builds the network of a recipe.

    A batch passes it in ``groups`` parts together, each with BatchNorm statistics of its own, as many as devices; and
    in ``recipe.accumulate`` parts one after the other. Its loss is one function of the whole batch all the same, and
    so its perturbation is.
    """
    shape, options = signature.image_shape, dict[str, Any](recipe.model_options)

    def make_model(seed: int | jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(jax.random.key(seed))
        return models.build(recipe.model, signature.num_classes, shape, rngs, recipe.dtype, **options)

    abstract = nnx.eval_shape(lambda: make_model(0))
    graphdef = nnx.graphdef(abstract)
    if in_python_file(recipe.model):
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        logits_of = lambda model, images: python_files.told(recipe.model, partial(model, images))
        models.check_logits(recipe.model, nnx.eval_shape(logits_of, abstract, images), 2, signature.num_classes)

    def init(seed: int | jax.Array) -> tuple[Any, Any]:
        model = make_model(seed)
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))

    def loss_of_batch(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.train()
        logits = model(images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), jnp.sum(jnp.argmax(logits, -1) == labels))

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.eval()
        return model(images)

    loss_fn: LossFn = loss_of_batch
    if groups > 1:
        loss_fn = _mean_over(loss_fn, lambda x: x.reshape(groups, -1, *x.shape[1:]), jax.vmap)
    if recipe.accumulate > 1:
        # Each part is spread over the batch, so that each device keeps what it has; for the memory of one part,
        # activations are computed again in the backward pass.
        split = lambda x: x.reshape(-1, recipe.accumulate, *x.shape[1:]).swapaxes(0, 1)
        loss_fn = _mean_over(loss_fn, split, lambda loss: partial(jax.lax.map, jax.checkpoint(loss)))
    return Network(init, loss_fn, logits)


def _mean_over(loss_fn: LossFn, split: Callable[[jax.Array], jax.Array], mapped: Callable[..., Any]) -> LossFn:
    """The mean over parts of a batch."""

    def mean_loss(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        of_parts = mapped(lambda part: loss_fn(params, model_state, *part))
        losses, (states, correct) = of_parts((split(images), split(labels)))
        return jnp.mean(losses), (jax.tree.map(lambda x: jnp.mean(x, axis=0), states), jnp.sum(correct))

    return mean_loss
