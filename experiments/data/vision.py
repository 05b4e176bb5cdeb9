"""CIFAR-10, CIFAR-100 and Fashion-MNIST, whole, in memory."""

import contextlib
import hashlib
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments import home
from experiments.data.dataset import Dataset, Split, check
from experiments.data.source import examples, find_builder, undamaged
from experiments.names import unknown

NAMES = ("cifar10", "cifar100", "fashion_mnist")

_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")  # of a file in the cache


def load(name: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Dataset:
    """Loads a data set, with ``mean`` and ``std`` of the training split.

    Decoding takes some ten seconds the first time; the bytes are then kept in ``cache_dir``, ~/.cache/crsam_jax by
    default. Of ``data_dir`` see :func:`experiments.data.source.find_data_dir`.

    Raises:
      ValueError: if there is no such data set, its files are damaged, or labels or shapes are not those it states.
      FileNotFoundError: saying what to do, if it has not been prepared.
    """
    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    builder = find_builder(name, data_dir)
    cache = _cache_path(builder, cache_dir)
    splits = _read_cache(cache)
    if splits is None:
        with undamaged(name, data_dir):
            splits = _decode(builder, "train"), _decode(builder, "test")
        _write_cache(cache, *splits)
    train, test = splits
    num_classes, shape = builder.info.features["label"].num_classes, builder.info.features["image"].shape
    check(name, (train, test), num_classes, shape)
    mean, std = channel_moments(train.images)
    return Dataset(name, train, test, num_classes, mean, std)


def channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1], exactly: from counts of the 256 levels."""
    levels = np.arange(256) / 255
    weights = [np.bincount(channel.ravel(), minlength=256) / channel.size for channel in np.moveaxis(images, -1, 0)]
    means = [float(w @ levels) for w in weights]
    return tuple(means), tuple(float(np.sqrt(w @ (levels - mean) ** 2)) for w, mean in zip(weights, means, strict=True))


def _decode(builder: Any, split: str) -> Split:
    pairs = [(example["image"], example["label"]) for example in examples(builder.as_data_source(split))]
    if not pairs:
        raise ValueError(f"{builder.name} has no example in its split {split}.")
    images, labels = zip(*pairs, strict=True)
    shapes = {np.shape(image) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"{builder.name}, {split}: images must have one shape, got {sorted(shapes)[:3]}.")
    return Split(np.array(images, np.uint8), np.array(labels, np.int32))


def _cache_path(builder: Any, cache_dir: str | Path | None) -> Path | None:
    """A name that changes with the files it was decoded from; None if there is no place for a cache."""
    cache_dir = home.cache_folder() if cache_dir is None else cache_dir
    if cache_dir is None:
        return None
    folder = Path(builder.data_path)
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    fingerprint = hashlib.sha256(repr((str(folder.resolve()), files)).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{builder.name}-{builder.version}-{fingerprint}.npz"


def _read_cache(path: Path | None) -> tuple[Split, Split] | None:
    """Both splits; None if they are not there, or damaged: then they are decoded again."""
    if path is None or not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            first, second, third, fourth = (arrays[name] for name in _ARRAYS)
            return Split(first, second), Split(third, fourth)
    except (EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path | None, train: Split, test: Split) -> None:
    """Keeps decoded splits; where that fails the next run decodes them again, and stderr says why."""
    if path is None:
        return
    partial = path.with_suffix(f".{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **dict(zip(_ARRAYS, (*train, *test), strict=True)))  # type: ignore[arg-type]
        partial.replace(path)  # whole or not at all, whoever else writes it
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        print(f"Decoded data is not kept in {path.parent}: {error.strerror or error}.", file=sys.stderr)
