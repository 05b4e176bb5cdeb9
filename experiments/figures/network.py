"""The loss of a recipe's network, and the images to measure it on: evaluation mode, no augmentation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import inputs
from experiments.augment import normalize
from experiments.data import subset
from experiments.data.dataset import Dataset, Split
from experiments.inputs import Batch, Signature
from experiments.network import make_network
from experiments.recipes import Recipe


class Losses(NamedTuple):
    """Functions of (params, batch, model_state), where a batch is images, normalized, and labels.

    Each is one object for all checkpoints, so that it is compiled once.

    Attributes:
      mean: cross-entropy, the batch's mean.
      each: that of each example, [examples].
      accuracy: in percent.
    """

    mean: Callable[[Any, Batch, Any], jax.Array]
    each: Callable[[Any, Batch, Any], jax.Array]
    accuracy: Callable[[Any, Batch, Any], jax.Array]


def losses_of(recipe: Recipe, signature: Signature) -> Losses:
    """Builds the loss of a recipe's network in evaluation mode, with stored statistics."""
    network = make_network(recipe, signature)

    def each(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(network.logits(params, model_state, images), labels)

    def mean(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        return jnp.mean(each(params, batch, model_state))

    def accuracy(params: Any, batch: Batch, model_state: Any) -> jax.Array:
        images, labels = batch
        return 100 * jnp.mean(jnp.argmax(network.logits(params, model_state, images), -1) == labels)

    return Losses(mean, each, accuracy)


def signature_of(recipe: Recipe, dataset: Dataset) -> Signature:
    """What the network must know about a data set in memory."""
    shape, steps = dataset.train.images.shape[1:], len(dataset.train.labels) // recipe.batch_size
    return Signature(shape, dataset.num_classes, dataset.mean, dataset.std, steps)


def load(recipe: Recipe) -> Dataset:
    """The data that a run was trained and evaluated on.

    Raises:
      ValueError: for ImageNet, which does not fit into memory.
    """
    if recipe.dataset == "imagenet2012":
        raise ValueError("Figures are drawn from data sets that fit into memory, and ImageNet does not.")
    return inputs.load(recipe)


def examples(split: Split, count: int, dataset: Dataset) -> Batch:
    """The same number of examples of each class, ``count`` in all, or all if there are no more; normalized."""
    if count < len(split.labels):
        split = subset.take_per_class(split, max(1, count // dataset.num_classes), seed=0)
    return normalize(jnp.asarray(split.images), dataset.mean, dataset.std), jnp.asarray(split.labels)
