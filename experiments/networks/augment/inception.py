"""Inception-style crops of batches: random area and aspect ratio, resized back.

Szegedy et al.: Going Deeper with Convolutions, CVPR 2015.
"""

import jax
import jax.numpy as jnp

MIN_AREA = 0.08
MAX_RATIO = 4 / 3
_ATTEMPTS = 10


def inception_crop(key: jax.Array, images: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Cuts out a random box of each image and resizes it, bilinearly and with antialiasing.

    Images are [batch, height, width, channels], uint8 or floating; ``size`` is the new height and width, by default
    the old.
    """
    count, height, width, _ = images.shape
    boxes = jax.vmap(lambda k: random_box(k, height, width))(jax.random.split(key, count))
    return jax.vmap(lambda image, box: resize_box(image, box, size or (height, width)))(images, boxes)


def random_box(key: jax.Array, height: int, width: int) -> jax.Array:
    """A box (upper, left, height, width), int32, of 8 to 100 % of the area and a ratio log-uniform in [3/4, 4/3].

    The first of ten random sizes that fits; if none does, the largest central box whose ratio is allowed.
    """
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (_ATTEMPTS,), minval=MIN_AREA, maxval=1.0) * (height * width)
    log_ratio = jax.random.uniform(ratio_key, (_ATTEMPTS,), minval=-1.0, maxval=1.0) * jnp.log(MAX_RATIO)
    heights = jnp.round(jnp.sqrt(area * jnp.exp(-log_ratio))).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area * jnp.exp(log_ratio))).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    central_size = jnp.array([min(height, round(width * MAX_RATIO)), min(width, round(height * MAX_RATIO))])
    box_size = jnp.where(fits[first], jnp.stack([heights[first], widths[first]]), central_size)
    room = jnp.array([height, width]) - box_size
    corner = jnp.where(fits[first], jax.random.randint(place_key, (2,), 0, room + 1), room // 2)
    return jnp.concatenate([corner, box_size])


def resize_box(image: jax.Array, box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The pixels of a box (upper, left, height, width), resized to ``size``."""
    upper, left, box_height, box_width = box
    rows = _triangle_weights(image.shape[0], size[0], upper, box_height)
    columns = _triangle_weights(image.shape[1], size[1], left, box_width)
    pixels = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    resized = jnp.einsum("yh,hwc,xw->yxc", rows, pixels, columns, precision=jax.lax.Precision.HIGHEST)
    if jnp.issubdtype(image.dtype, jnp.integer):
        resized = jnp.round(resized)
    return resized.astype(image.dtype)


def _triangle_weights(length: int, new_length: int, start: jax.Array, extent: jax.Array) -> jax.Array:
    """How much each pixel of [start, start + extent) enters each new one: [new_length, length], rows add up to one."""
    scale = extent / new_length
    centers = start + (jnp.arange(new_length)[:, None] + 0.5) * scale
    pixels = jnp.arange(length) + 0.5
    weights = jnp.maximum(0, 1 - jnp.abs(pixels - centers) / jnp.maximum(scale, 1))
    weights = jnp.where((start < pixels) & (pixels < start + extent), weights, 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)
