"""Image classification data that TFDS prepared, whole, in memory."""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.data import cache, images
from experiments.data.dataset import Dataset, Split, assemble, channel_moments, check
from experiments.data.source import examples, find_builder, undamaged

NAMES = ("cifar10", "cifar100", "fashion_mnist")
"""The recipes' data sets, whose shape, classes and splits are known."""

Pairs = Iterable[tuple[Any, int]]
"""Images and their labels."""

_SPLITS = ("train", "test", "validation")


def load(
    name: str, data_dir: str | Path | None = None, cache_dir: str | Path | None = None, image_size: int = 224
) -> Dataset:
    """Loads a data set, with ``mean`` and ``std`` of the training split.

    Decoding takes some ten seconds the first time; the bytes are then kept in ``cache_dir``, ~/.cache/crsam_jax by
    default. Of ``data_dir`` see :func:`experiments.data.source.find_data_dir`. Images of several sizes, or larger than
    ``image_size``, become squares of that side.

    Raises:
      ValueError: if there is no such data set, its files are damaged, it is no image classification, or labels or
        shapes are not those it states.
      FileNotFoundError: saying what to do, if it has not been prepared.
    """
    builder = find_builder(name, data_dir)
    image, label = _keys(name, builder)
    stated, num_classes = builder.info.features[image].shape, builder.info.features[label].num_classes
    names = [split for split in _SPLITS if split in builder.info.splits]
    is_resized = any(size is None or size > image_size for size in stated[:2])

    def decode() -> cache.Arrays:
        with undamaged(name, data_dir):
            if is_resized:
                read = _resized(builder, names, image, label, image_size)
            else:
                read = partial(_as_stored, builder, image=image, label=label)
            splits = {split: _stacked(builder.name, split, read(split)) for split in names}
        return {f"{split}_{part}": array for split, found in splits.items() for part, array in found._asdict().items()}

    arrays = cache.kept(_cache_path(builder, cache_dir, image_size if is_resized else None), decode, _parts(names))
    splits = {split: Split(*(arrays[part] for part in _parts([split]))) for split in names}
    if name in NAMES:
        train, test = splits["train"], splits["test"]
        check(name, (train, test), num_classes, stated)
        return Dataset(name, train, test, num_classes, *channel_moments(train.images))
    return assemble(name, splits, builder.info.features[label].names)


def _keys(name: str, builder: Any) -> tuple[str, str]:
    """The features that hold the image and its class; a data set without them is a ValueError."""
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys or ("image", "label")
    kinds = tfds.features.Image, tfds.features.ClassLabel
    is_images = isinstance(features, tfds.features.FeaturesDict) and len(keys) == 2
    if not (
        is_images
        and all(key in features and type(features[key]) is kind for key, kind in zip(keys, kinds, strict=True))
    ):
        found = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in features.items()) if is_images else features
        raise ValueError(f"{name} is no image classification, an image and its class; its features are {found}.")
    if "train" not in builder.info.splits:
        raise ValueError(f"{name} has no split train; it has {', '.join(builder.info.splits)}.")
    return keys


def _parts(splits: list[str]) -> list[str]:
    """The names of the arrays in a file of the cache."""
    return [f"{split}_{part}" for split in splits for part in Split._fields]


def _as_stored(builder: Any, split: str, image: str, label: str) -> Pairs:
    return ((example[image], example[label]) for example in examples(builder.as_data_source(split)))


def _resized(builder: Any, splits: list[str], image: str, label: str, side: int) -> Callable[[str], Pairs]:
    """What reads a split whose images are brought to the form that all splits share."""
    import tensorflow_datasets as tfds

    def encoded(split: str) -> Iterator[tuple[Image.Image, int]]:
        skip = {image: tfds.decode.SkipDecoding()}
        for example in examples(builder.as_data_source(split, decoders=skip)):
            yield Image.open(io.BytesIO(example[image])), example[label]

    form = images.common_form(((builder.name, found) for split in splits for found, _ in encoded(split)), side)
    return lambda split: ((images.pixels(found, form), number) for found, number in encoded(split))


def _stacked(name: str, split: str, pairs: Pairs) -> Split:
    found = list(pairs)
    if not found:
        raise ValueError(f"{name} has no example in its split {split}.")
    pixels, labels = zip(*found, strict=True)
    shapes = {np.shape(image) for image in pixels}
    if len(shapes) > 1:
        raise ValueError(f"{name}, {split}: images must have one shape, got {sorted(shapes)[:3]}.")
    return Split(np.array(pixels, np.uint8), np.array(labels, np.int32))


def _cache_path(builder: Any, cache_dir: str | Path | None, side: int | None) -> Path | None:
    """A name that changes with the files it was decoded from; None if there is no place for a cache."""
    folder = Path(builder.data_path)
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    made_of = (str(folder.resolve()), files) if side is None else (str(folder.resolve()), files, side)
    return cache.path(f"{builder.name}-{builder.version}", made_of, cache_dir)
