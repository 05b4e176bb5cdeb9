"""Data as arrays: an ``.npz`` file, or what a user's function returns."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.dataset import Dataset, Split, assemble

_SPLITS = {"train": ("train",), "test": ("test",), "validation": ("validation", "val", "valid")}
_IMAGES, _LABELS = ("{}_images", "x_{}"), ("{}_labels", "y_{}")  # ours and MedMNIST's, Keras's

EXPECTED = (
    "train_images and train_labels, and perhaps test_images, test_labels, validation_images, validation_labels (or "
    "x_train, y_train, ...)"
)


def read_npz(path: Path) -> Dataset:
    """The data set in an ``.npz`` file; see :func:`from_arrays`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (EOFError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no .npz file of plain arrays: {reason}") from error
    return from_arrays(path.name, found)


def has_validation(path: Path) -> bool:
    """Whether an ``.npz`` file has validation data and test data; nothing but its list of names is read."""
    try:
        with zipfile.ZipFile(path) as file:
            arrays = dict.fromkeys(name.removesuffix(".npy") for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return all(_key(arrays, _IMAGES, _SPLITS[split]) for split in ("test", "validation"))


def from_arrays(name: str, arrays: Any) -> Dataset:
    """A data set from arrays by name: ``train_images`` and ``train_labels``, perhaps ``test_...``, ``validation_...``.

    Images are uint8 of shape [examples, height, width] or [examples, height, width, channels]; labels are whole numbers
    from 0 on, or names of classes. Keras's names, ``x_train`` and ``y_train``, are understood too.

    Raises:
      ValueError: naming the array, what it must be and what it is.
    """
    if not isinstance(arrays, Mapping):
        raise ValueError(f"{name} must give a dict of arrays, {EXPECTED}, got {type(arrays).__name__}.")
    found = {}
    for split, titles in _SPLITS.items():
        images, labels = (_array(arrays, forms, titles) for forms in (_IMAGES, _LABELS))
        if (images is None) != (labels is None):
            missing = "images" if images is None else "labels"
            raise ValueError(f"{name} has no {split}_{missing}; it holds {', '.join(map(str, arrays))}.")
        if images is not None and labels is not None:
            found[split] = _checked_images(f"{name}, {images[0]}", images[1]), _flat(f"{name}, {labels[0]}", labels[1])
            if len(images[1]) != len(labels[1]):
                raise ValueError(f"{name}, {split}: there are {len(images[1])} images and {len(labels[1])} labels.")
    if "train" not in found:
        raise ValueError(f"{name} must hold {EXPECTED}; it holds {', '.join(map(str, arrays)) or 'nothing'}.")
    classes, splits = _numbered(name, found)
    return assemble(name, splits, classes)


def _key(arrays: Mapping[Any, Any], forms: tuple[str, ...], titles: tuple[str, ...]) -> str | None:
    keys = [form.format(title) for form in forms for title in titles]
    return next((key for key in keys if key in arrays), None)


def _array(arrays: Mapping[Any, Any], forms: tuple[str, ...], titles: tuple[str, ...]) -> tuple[str, np.ndarray] | None:
    key = _key(arrays, forms, titles)
    return None if key is None else (key, np.asarray(arrays[key]))


def _checked_images(where: str, images: np.ndarray) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"{where} must have the shape [examples, height, width, channels], none of them 0, got "
            f"{list(images.shape)}."
        )
    if images.dtype != np.uint8:
        ends = f" in {images.min():g}, ..., {images.max():g}" if np.issubdtype(images.dtype, np.number) else ""
        raise ValueError(
            f"{where} must be uint8, 0 for black to 255 for white, got {images.dtype}{ends}: scale and convert them, "
            "as by (255 * images).round().astype(numpy.uint8)."
        )
    return images


def _flat(where: str, labels: np.ndarray) -> np.ndarray:
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype.kind in "US"):
        raise ValueError(
            f"{where} must be a list of whole numbers from 0 on, or of names, got {labels.dtype} of shape "
            f"{list(labels.shape)}."
        )
    return labels


def _numbered(name: str, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[list[str], dict[str, Split]]:
    """The classes, and all splits with their numbers as labels; the training data decides which classes there are."""
    labels = found["train"][1]
    if np.issubdtype(labels.dtype, np.integer):
        lowest, highest = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
        if lowest < 0 or highest >= 2**16:
            raise ValueError(f"{name}, train: labels must be in 0, ..., classes - 1, got {lowest}, ..., {highest}.")
        if missing := sorted(set(range(highest + 1)) - set(labels.tolist())):
            raise ValueError(
                f"{name}, train: labels must be in 0, ..., {highest} with images of each class, but {missing[0]} has "
                "none: number the classes from 0 on without a gap."
            )
        classes = [str(number) for number in range(highest + 1)]
        for split, (_, own) in found.items():
            if not np.issubdtype(own.dtype, np.integer):
                raise ValueError(f"{name}, {split}: labels must be whole numbers as in train, got {own.dtype}.")
        return classes, {split: Split(images, own.astype(np.int32)) for split, (images, own) in found.items()}
    classes = sorted(set(labels.astype(str).tolist()))
    numbers = {label: number for number, label in enumerate(classes)}
    splits = {}
    for split, (images, own) in found.items():
        names = own.astype(str).tolist()
        if unknown := sorted(set(names) - numbers.keys()):
            raise ValueError(f"{name}, {split}: class {unknown[0]!r} is not in train.")
        splits[split] = Split(images, np.array([numbers[label] for label in names], np.int32))
    return classes, splits
