"""What a data set is here: whole splits in memory, as bytes."""

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
