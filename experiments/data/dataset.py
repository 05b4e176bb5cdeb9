"""What a data set is here: whole splits in memory, as bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

TEST_SHARE = 0.2
"""Of the training images, for the test data of a data set that has none."""


class Split(NamedTuple):
    """Images, uint8 of shape [examples, height, width, channels], and labels, int32 of shape [examples]."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Splits of one data set; ``mean`` and ``std`` are per channel, of training pixels in [0, 1].

    ``note`` says in a line what was found, for data of the user.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Split | None = None
    note: str = ""


def assemble(name: str, splits: Mapping[str, Split], classes: Sequence[str]) -> Dataset:
    """A data set of any classes and images, checked.

    Without a split ``test`` it is tested on the validation data; without that too on a fifth of the training images of
    each class, the same for every run.

    Raises:
      ValueError: naming the split and what is wrong.
    """
    train, test, validation = splits["train"], splits.get("test"), splits.get("validation")
    source = ""
    if test is None and validation is not None:
        test, validation, source = validation, None, ", the validation split"
    elif test is None:
        train, test = _held_out(name, train, classes)
        source = f", {TEST_SHARE:.0%} of the training images"
    named = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    check(name, named.values(), len(classes), train.images.shape[1:], tuple(named))
    sizes = [f"{len(train.labels)} training", f"{len(test.labels)} test images{source}"]
    if validation is not None:
        sizes.insert(1, f"{len(validation.labels)} validation")
    height, width, channels = train.images.shape[1:]
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    note = (
        f"{name}: {', '.join(sizes)}; {height}x{width} pixels, {channels} channel(s); {len(classes)} classes: {shown}"
    )
    return Dataset(name, train, test, len(classes), *channel_moments(train.images), validation, note)


def channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], exactly: from counts of the 256 levels."""
    levels = np.arange(256) / 255
    weights = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in np.moveaxis(images, -1, 0)]
    means = [float(w @ levels) for w in weights]
    return tuple(means), tuple(float(np.sqrt(w @ (levels - mean) ** 2)) for w, mean in zip(weights, means, strict=True))


def check(
    name: str,
    splits: Iterable[Split],
    num_classes: int,
    shape: tuple[int | None, ...],
    names: Sequence[str] = ("train", "test"),
) -> None:
    """Checks that images have the shape, and labels the range, that a data set states.

    Raises:
      ValueError: naming the data set, the split and what is wrong.
    """
    for split, (images, labels) in zip(names, splits, strict=True):
        where = f"{name}, {split}"
        found = images.shape[1:]
        if len(found) != len(shape) or any(size not in (None, own) for own, size in zip(found, shape, strict=True)):
            raise ValueError(f"{where}: images must have shape {list(shape)}, got {list(found)}.")
        if len(images) != len(labels):
            raise ValueError(f"{where}: there are {len(images)} images and {len(labels)} labels.")
        check_labels(where, labels, num_classes)


def check_labels(where: str, labels: np.ndarray, num_classes: int, padding: int | None = None) -> None:
    """Checks that labels are in 0, ..., ``num_classes`` − 1, or ``padding``.

    Raises:
      ValueError: with the range that was found.
    """
    counted = labels if padding is None else labels[labels != padding]
    if counted.size and not (counted.min() >= 0 and counted.max() < num_classes):
        raise ValueError(
            f"{where}: labels must be in 0, ..., {num_classes - 1} for {num_classes} classes, but they are in "
            f"{counted.min()}, ..., {counted.max()}."
        )


def _held_out(name: str, train: Split, classes: Sequence[str]) -> tuple[Split, Split]:
    """Training and test examples, in the order of the original."""
    rng, is_test = np.random.default_rng(0), np.zeros(len(train.labels), bool)
    for label, title in enumerate(classes):
        members = np.flatnonzero(train.labels == label)
        if len(members) == 1:
            raise ValueError(
                f"{name}: there is no test data, and class {title!r} has a single training image, so none can be "
                "taken from it: add images of it, or test data."
            )
        is_test[rng.permutation(members)[: math.ceil(TEST_SHARE * len(members))]] = True
    return Split(*(array[~is_test] for array in train)), Split(*(array[is_test] for array in train))
