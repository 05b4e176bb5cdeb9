"""The embedded data set: 1,797 handwritten digits of 8×8 pixels that ship inside scikit-learn.

Source: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (Alpaydin and Kaynak, 1998).
"""

import numpy as np

from experiments.data.dataset import Dataset, Split, channel_moments
from experiments.data.subset import divide

TRAINING_EXAMPLES_PER_CLASS = 100


def load() -> Dataset:
    """1,000 training images, 100 of each class, and 797 test images, uint8 [examples, 8, 8, 1], the same for every run.

    The 17 grey levels take all of a byte's range.
    """
    from sklearn.datasets import load_digits  # here: other data and every --help need no second for it

    digits = load_digits()
    images, labels = (15 * digits.images).astype(np.uint8)[..., None], digits.target.astype(np.int32)
    chosen, rest = divide(labels, dict.fromkeys(range(10), TRAINING_EXAMPLES_PER_CLASS), seed=0)
    train, test = Split(images[chosen], labels[chosen]), Split(images[rest], labels[rest])
    return Dataset("digits", train, test, 10, *channel_moments(train.images))
