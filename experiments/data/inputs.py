"""Where a recipe's batches come from: small data sets from the device's memory, ImageNet from worker processes."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.data import catalog, imagenet, source, subset
from experiments.data.dataset import Dataset, Split, check_labels
from experiments.settings.configs import Run
from experiments.settings.recipes import Recipe
from experiments.system.interruptions import held_back

EVALUATION_BATCH = 1000

_PRETRAINED_MOMENTS = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite's training had these, not ImageNet's own

Batch = tuple[jax.Array, jax.Array]
"""Images, uint8 [batch, height, width, channels], and labels, int32 [batch]; −1 marks padding."""


class Signature(NamedTuple):
    """What a network must know about its data.

    Attributes:
      image_shape: of the images that the network gets, see :func:`experiments.networks.augment.scaled`.
      num_classes: of the labels.
      mean, std: what the images are normalized with, see :func:`experiments.networks.augment.normalize`.
      steps_per_epoch: whole batches of the training data.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps_per_epoch: int

    @property
    def data(self) -> dict[str, Any]:
        """The part that depends on the data only, noted in each checkpoint."""
        return {"image_shape": list(self.image_shape), "num_classes": self.num_classes}


class Inputs(NamedTuple):
    """The data of one run.

    Attributes:
      signature: shapes and moments.
      feed: from a step's number to what the jitted step gets; see :func:`select`.
      evaluation: makes an iterator over the evaluation batches.
      examples: from a count to at most that many training examples, spread over the split; to None if it is streamed.
      position: what to save so that ``restore`` makes the next ``feed`` the right one; JSON.
      restore: sets a position.
    """

    signature: Signature
    feed: Callable[[int], Any]
    evaluation: Callable[[], Iterator[Batch]]
    examples: Callable[[int], Batch | None]
    position: Callable[[], Any]
    restore: Callable[[Any], None]


def open_inputs(recipe: Recipe, mesh: Mesh, run: Run = Run()) -> Inputs:  # noqa: B008
    """Opens a recipe's data for training and evaluation over a mesh."""
    if recipe.batch_size % (mesh.size * recipe.accumulate):
        raise ValueError(
            f"A batch of {recipe.batch_size} cannot be shared equally by {mesh.size} devices in {recipe.accumulate} "
            "part(s): change --batch-size, --accumulate or --devices."
        )
    if recipe.dataset == "imagenet2012":
        return _streamed(recipe, mesh, run)
    return in_memory(recipe, load(recipe, run.data_dir), mesh)


def load(recipe: Recipe, data_dir: Path | None = None) -> Dataset:
    """A small data set with the recipe's validation split, subset and label noise; moments are of the whole.

    The validation data is what ``validation_fraction`` holds out, or else the data set's own.

    What is held out does not depend on the seed, and neither does its complement, which subsets are drawn from: a
    search on the validation data trains on as many images as the runs that follow.
    """
    dataset = _whole(recipe.dataset, data_dir, recipe.image_size)
    train, test, validation = dataset.train, dataset.test, dataset.validation
    if recipe.validation_fraction:
        train, validation = subset.split_validation(train, recipe.validation_fraction, seed=0)
    if recipe.evaluate_on == "validation":
        if validation is None:
            raise ValueError(
                "There is no validation data to evaluate on: hold some out with --validation-fraction 0.1."
            )
        test = validation
    if recipe.examples_per_class is not None:
        train = subset.take_per_class(train, recipe.examples_per_class, recipe.seed)
    if recipe.test_examples_per_class is not None:
        test = subset.take_per_class(test, recipe.test_examples_per_class, seed=0)
    if recipe.label_noise:
        train = subset.with_label_noise(train, recipe.label_noise, dataset.num_classes, recipe.seed)
    return dataset._replace(train=train, test=test)


def note_of(recipe: Recipe, data_dir: Path | None = None) -> str:
    """What was found, in a line, if the data is the user's own; else empty."""
    if recipe.dataset == "imagenet2012":
        return ""
    return _whole(recipe.dataset, data_dir, recipe.image_size).note


def signature_of(recipe: Recipe, data_dir: Path | None = None) -> Signature:
    """Shapes and moments, for ImageNet without its data."""
    if recipe.dataset == "imagenet2012":
        shape = (recipe.image_size, recipe.image_size, 3)
        steps = imagenet.TRAINING_EXAMPLES // recipe.batch_size
        return Signature(shape, imagenet.NUM_CLASSES, imagenet.MEAN, imagenet.STD, steps)
    return signature_in_memory(recipe, load(recipe, data_dir))


def signature_in_memory(recipe: Recipe, dataset: Dataset) -> Signature:
    """Shapes and moments of a data set that is loaded, as the network gets it."""
    shape, steps = dataset.train.images.shape[1:], len(dataset.train.labels) // recipe.batch_size
    if recipe.pretrained is None:
        return Signature(shape, dataset.num_classes, dataset.mean, dataset.std, steps)
    if shape[-1] not in (1, 3):
        raise ValueError(f"--pretrained is for grey or color images, and {dataset.name} has {shape[-1]} channels.")
    scale = max(1.0, recipe.image_size / max(shape[:2]))
    shape = round(scale * shape[0]), round(scale * shape[1]), 3
    return Signature(shape, dataset.num_classes, *_PRETRAINED_MOMENTS, steps)


def in_memory(recipe: Recipe, dataset: Dataset, mesh: Mesh) -> Inputs:
    """The training split on every device, as uint8; an epoch's order is a function of seed and epoch."""
    signature, examples = signature_in_memory(recipe, dataset), len(dataset.train.labels)
    steps = signature.steps_per_epoch
    if not steps:
        raise ValueError(
            f"{examples} training examples do not fill a batch of {recipe.batch_size}: choose a smaller --batch-size."
        )
    images, labels = (_everywhere(array, mesh) for array in dataset.train)
    order: dict[int, jax.Array] = {}  # of the current epoch

    def feed(step: int) -> Any:
        epoch = step // steps
        if epoch not in order:
            order.clear()
            order[epoch] = _shuffled(recipe.seed, epoch, examples, (steps, recipe.batch_size), mesh)
        return images, labels, order[epoch]

    def some(count: int) -> Batch:
        spread = np.linspace(0, examples, min(count, examples), endpoint=False, dtype=int)  # it may be sorted by class
        images, labels = (_everywhere(array[spread], mesh) for array in dataset.train)
        return images, labels

    return Inputs(signature, feed, partial(split_batches, dataset.test, mesh), some, dict, lambda position: None)


def select(feed: Any, step: jax.Array, mesh: Mesh) -> Batch:
    """The batch of a step, inside the jitted step, from what ``feed`` gave: a batch, or whole split and order."""
    if len(feed) == 2:
        return feed
    images, labels, order = feed
    chosen = jax.lax.with_sharding_constraint(order[step % len(order)], NamedSharding(mesh, P("data")))
    return images[chosen], labels[chosen]


@partial(jax.jit, static_argnames=("examples", "shape", "mesh"))
def _shuffled(seed: int, epoch: int, examples: int, shape: tuple[int, int], mesh: Mesh) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    order = jax.random.permutation(key, examples)[: shape[0] * shape[1]].reshape(shape)
    return jax.lax.with_sharding_constraint(order, NamedSharding(mesh, P()))


def _everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P()), array, array.shape)


def split_batches(split: Split, mesh: Mesh) -> Iterator[Batch]:
    """A split in order, the last batch padded; each process makes its own part."""
    batch_size = -(-EVALUATION_BATCH // mesh.size) * mesh.size
    for start in range(0, len(split.labels), batch_size):
        images, labels = (array[start : start + batch_size] for array in split)
        padding = batch_size - len(labels)
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(labels, (0, padding), constant_values=imagenet.PADDING)
        share = batch_size // jax.process_count()
        part = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        yield _shared((images[part], labels[part]), mesh)


def streamed_batches(
    recipe: Recipe, mesh: Mesh, run: Run, name: str = "imagenet2012", split: str = "validation"
) -> Iterator[Batch]:
    """The evaluation batches of ImageNet, or of a relative with its classes."""
    with held_back():
        batches = _reader(recipe, run).eval_batches(recipe.batch_size, name, split)
    for batch in source.read(batches, name, run.data_dir):
        check_labels(f"{name}, {split}", batch["label"], imagenet.NUM_CLASSES, imagenet.PADDING)
        yield _shared((batch["image"], batch["label"]), mesh)


def _streamed(recipe: Recipe, mesh: Mesh, run: Run) -> Inputs:
    with held_back():  # also in the worker processes that start here
        iterator = _reader(recipe, run).train_batches(recipe.batch_size, recipe.seed)
    examples = source.find_builder("imagenet2012", run.data_dir).info.splits["train"].num_examples
    signature = signature_of(recipe)._replace(steps_per_epoch=examples // recipe.batch_size)
    batches = source.read(iterator, "imagenet2012", run.data_dir)

    def feed(step: int) -> Batch:
        batch = next(batches)
        check_labels("imagenet2012, train", batch["label"], imagenet.NUM_CLASSES)
        return _shared((batch["image"], batch["label"]), mesh)

    evaluation = partial(streamed_batches, recipe, mesh, run)
    return Inputs(signature, feed, evaluation, lambda count: None, iterator.get_state, iterator.set_state)


def _reader(recipe: Recipe, run: Run) -> imagenet.Reader:
    return imagenet.Reader(run.data_dir, recipe.image_size, run.workers, jax.process_index(), jax.process_count())


def _shared(local: tuple[np.ndarray, np.ndarray], mesh: Mesh) -> Batch:
    """The batch of all processes, from this process's part."""
    over_examples = NamedSharding(mesh, P("data"))
    images, labels = (jax.make_array_from_process_local_data(over_examples, array) for array in local)
    return images, labels


@cache
def _whole(name: str, data_dir: Path | None, image_size: int) -> Dataset:
    """All of a data set; the runs of a process share it."""
    return catalog.load(name, data_dir, image_size)
