"""What a data set is here: whole splits in memory, as bytes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images, uint8 of shape [examples, height, width, channels], and labels, int32 of shape [examples]."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Training and test split of one data set; ``mean`` and ``std`` are per channel, of pixels in [0, 1]."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check(name: str, splits: Iterable[Split], num_classes: int, shape: tuple[int | None, ...]) -> None:
    """Checks that images have the shape, and labels the range, that a data set states.

    Raises:
      ValueError: naming the data set, the split and what is wrong.
    """
    for split, (images, labels) in zip(("train", "test"), splits, strict=True):
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
