"""A folder of images: ``train/CLASS/*.png``, and perhaps ``test/`` and ``validation/`` with the same classes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from experiments.data import cache
from experiments.data.dataset import Dataset, Split, assemble
from experiments.data.images import common_form, pixels
from experiments.settings.suggestions import unknown
from experiments.system import files

SPLITS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "val", "valid")}
"""The names of the folders of each split."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

T = TypeVar("T")
Paths = dict[str, list[list[Path]]]
"""Of each split the images of each class."""


def load(folder: Path, image_size: int, cache_dir: str | Path | None = None) -> Dataset:
    """Reads all images; with several sizes, or larger than ``image_size``, they become squares of that side.

    Classes are the folders in ``train``, in alphabetical order. Decoded images are kept in the cache.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: naming the folder or the image that is wrong, and what to do.
    """
    classes, paths = _listed(folder)
    every = [path for split in paths.values() for group in split for path in group]
    stamps = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in every]
    file = cache.path(folder.name, (str(folder.resolve()), image_size, stamps), cache_dir)
    kept = cache.kept(file, lambda: _decoded(paths, image_size), [f"{split}_images" for split in paths])
    splits = {}
    for split, groups in paths.items():
        labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(group) for group in groups])
        splits[split] = Split(kept[f"{split}_images"], labels)
    return assemble(folder.name, splits, classes)


def has_validation(folder: Path) -> bool:
    """Whether a folder has validation data and test data."""
    return all(_split_folder(folder, split) for split in ("validation", "test"))


def _split_folder(folder: Path, split: str) -> Path | None:
    """The folder of a split, by whichever of its names it has."""
    return next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)


def _listed(folder: Path) -> tuple[list[str], Paths]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; name a folder with train/CLASS/*.png, or an .npz file.")
    found = {split: path for split in SPLITS if (path := _split_folder(folder, split))}
    if "train" not in found:
        seen = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(f"{folder} has no folder train with a folder of images for each class; it holds {seen}.")
    classes = _classes(found["train"])
    if len(classes) < 2:
        raise ValueError(f"{found['train']} must hold a folder for each of at least two classes, got {classes}.")
    paths: Paths = {}
    for split, path in found.items():
        for name in _classes(path):
            if name not in classes:
                raise unknown(f"class in {found['train']} like that of {path / name},", name, classes)
        paths[split] = [_images(path / name) for name in classes]
        if not any(paths[split]):
            raise ValueError(f"{path} has no image of the classes {', '.join(classes[:10])}.")
        for name, images in zip(classes, paths[split], strict=True):
            if split == "train" and not images:
                raise ValueError(f"{path / name} has no image; known are files ending in {' '.join(SUFFIXES)}.")
    return classes, paths


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The images of a class, also in folders below it, in alphabetical order."""
    found = [Path(top) / name for top, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and not files.is_of_system(path))


def _decoded(paths: Paths, image_size: int) -> dict[str, np.ndarray]:
    every = {split: [path for group in groups for path in group] for split, groups in paths.items()}
    headers = ((str(path), _read(path, lambda image: image)) for images in every.values() for path in images)
    form = common_form(headers, image_size)
    return {
        f"{split}_images": np.stack([_read(path, lambda image: pixels(image, form)) for path in images])
        for split, images in every.items()
    }


def _read(path: Path, act: Callable[[Image.Image], T]) -> T:
    """What is done with an open image; a damaged one is a ValueError that names it."""
    try:
        with Image.open(path) as image:
            return act(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged, or no image: replace or remove it. ({str(error)[:100]})") from error
