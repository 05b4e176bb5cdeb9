"""Decoded images of any size and mode, brought to one shape."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

_GREY, _DEEP = ("1", "L", "LA"), ("I", "F", "I;16", "I;16B", "I;16L")


class Form(NamedTuple):
    """What all images of a data set are brought to: their size, None where it is their own, and their mode."""

    size: tuple[int, int] | None
    """Width and height."""
    mode: str


def common_form(images: Iterable[tuple[str, Image.Image]], side: int) -> Form:
    """The form of images, from their headers alone.

    Images of one size no larger than ``side`` keep it; others become squares of that side. They become grey if all are.

    Raises:
      ValueError: for an image of 16 bits, by name.
    """
    sizes, is_grey = set[tuple[int, int]](), True
    for name, image in images:
        if image.mode in _DEEP:
            raise ValueError(f"{name} has pixels of more than 8 bits (mode {image.mode}): convert it to 8 bits.")
        sizes.add(image.size)
        is_grey = is_grey and image.mode in _GREY
    is_kept = len(sizes) == 1 and max(max(size) for size in sizes) <= side
    return Form(None if is_kept else (side, side), "L" if is_grey else "RGB")


def pixels(image: Image.Image, form: Form) -> np.ndarray:
    """An image as uint8 [height, width, channels]; scaled ones are cropped to the central part of the right shape."""
    image = image.convert(form.mode)
    if form.size is not None and image.size != form.size:
        scale = min(image.width / form.size[0], image.height / form.size[1])
        width, height = form.size[0] * scale, form.size[1] * scale
        left, upper = (image.width - width) / 2, (image.height - height) / 2
        box = (left, upper, left + width, upper + height)
        image = image.resize(form.size, Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
