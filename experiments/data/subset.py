"""Smaller, split and mislabelled versions of a split; the same seed gives the same one everywhere."""

import numpy as np

from experiments.data.dataset import Split


def with_label_noise(split: Split, fraction: float, num_classes: int, seed: int) -> Split:
    """Symmetric label noise: a fraction of the labels, in whole examples, becomes another class, each as likely.

    Example:
      >>> split = Split(np.zeros((10, 1, 1, 1), np.uint8), np.arange(10, dtype=np.int32) % 2)
      >>> noisy = with_label_noise(split, 0.4, num_classes=2, seed=0)
      >>> int(np.sum(noisy.labels != split.labels))
      4
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"The fraction of wrong labels must be in [0, 1], got {fraction:g}.")
    if num_classes < 2:
        raise ValueError(f"Label noise needs at least two classes, got {num_classes}.")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(split.labels))[: round(fraction * len(split.labels))]
    labels = split.labels.copy()
    labels[chosen] = (labels[chosen] + rng.integers(1, num_classes, len(chosen))) % num_classes
    return Split(split.images, labels)


def take_per_class(split: Split, count: int, seed: int) -> Split:
    """A random subset with ``count`` examples of each class, in the order of the original."""
    chosen, _ = divide(split.labels, dict.fromkeys(np.unique(split.labels).tolist(), count), seed)
    return Split(split.images[chosen], split.labels[chosen])


def split_validation(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Training and validation examples, in the order of the original; of each class the fraction goes to the latter."""
    if not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be in (0, 1), got {fraction:g}.")
    classes, sizes = np.unique(split.labels, return_counts=True)
    counts = {label: round(fraction * size) for label, size in zip(classes.tolist(), sizes.tolist(), strict=True)}
    chosen, rest = divide(split.labels, counts, seed)
    return Split(split.images[rest], split.labels[rest]), Split(split.images[chosen], split.labels[chosen])


def divide(labels: np.ndarray, counts: dict[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of ``counts[label]`` random examples of each class, and of all others; both ascending."""
    rng = np.random.default_rng(seed)
    is_chosen = np.zeros(len(labels), bool)
    for label, count in counts.items():
        members = np.flatnonzero(labels == label)
        if not 1 <= count <= len(members):
            raise ValueError(f"Cannot take {count} of the {len(members)} examples of class {label}.")
        is_chosen[rng.permutation(members)[:count]] = True
    return np.flatnonzero(is_chosen), np.flatnonzero(~is_chosen)
