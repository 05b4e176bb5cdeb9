"""The embedded data set: 1,797 handwritten digits of 8×8 pixels that ship inside scikit-learn.

Source: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (Alpaydin and Kaynak, 1998).
"""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from experiments.data.dataset import Split

NUM_CLASSES = 10
_SPLIT_SEED = 0  # the splits are part of the task: every run sees the same ones


class Digits(NamedTuple):
    """Stratified parts of the data set that share no image. Label noise is for the training part alone."""

    train: Split
    validation: Split
    test: Split


def load(train_examples: int, validation_examples: int = 500) -> Digits:
    """Loads the images as uint8 [examples, 8, 8, 1], grey levels 0..16, and splits them.

    The test split is all that the other two leave, and the validation split does not depend on
    ``train_examples``.

    Raises:
      ValueError: if less than 10 test images per class would be left.
    """
    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rest = len(labels) - train_examples - validation_examples
    if train_examples < NUM_CLASSES or rest < 10 * NUM_CLASSES:
        raise ValueError(
            f"train_examples must be between {NUM_CLASSES} and "
            f"{len(labels) - validation_examples - 10 * NUM_CLASSES} of the {len(labels)} images, got {train_examples}."
        )
    rest_index, validation = _stratified(np.arange(len(labels)), labels, validation_examples)
    test, train = _stratified(rest_index, labels, train_examples)
    return Digits(*(Split(images[index], labels[index]) for index in (train, validation, test)))


def normalized(images: np.ndarray) -> np.ndarray:
    """Float32 images of about zero mean and unit variance over the data set."""
    return ((images.astype(np.float32) - 4.884) / 6.017).astype(np.float32)


def _stratified(index: np.ndarray, labels: np.ndarray, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The index split in two, the second part with ``examples`` elements, both with all classes in proportion."""
    first, second = train_test_split(index, test_size=examples, stratify=labels[index], random_state=_SPLIT_SEED)
    return first, second
