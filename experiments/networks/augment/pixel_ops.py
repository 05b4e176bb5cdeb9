"""The three kinds of image operation that AutoAugment is made of, on one uint8 image [height, width, channels].

Whole numbers throughout, so that every device computes the same bytes as the Python imaging library, with
which the policy was found. (It blends and stretches in floating point, and may end just below a whole number.)
"""

from functools import partial

import jax
import jax.numpy as jnp

ENHANCEMENTS = ("Identity", "Brightness", "Color", "Contrast", "Sharpness")
TONES = ("Table", "AutoContrast", "Equalize")

GREY = 128  # fills what a geometric operation leaves empty
FIXED_POINT = 16  # fractional bits of the coordinates in a geometric operation


def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Moves pixels: position (x, y) takes the nearest pixel at matrix · (x, y, 1), or grey if that lies outside.

    The matrix is int32 [2, 3], in units of 2⁻¹⁶ pixels; the position (x, y) is the centre of that pixel.
    """
    height, width, _ = image.shape
    y, x = jnp.mgrid[:height, :width]
    from_x, from_y = ((row[0] * x + row[1] * y + row[2]) >> FIXED_POINT for row in matrix)
    is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    pixels = image[jnp.clip(from_y, 0, height - 1), jnp.clip(from_x, 0, width - 1)]
    return jnp.where(is_inside[..., None], pixels, GREY).astype(image.dtype)


def enhance(image: jax.Array, kind: jax.Array, tenths: jax.Array) -> jax.Array:
    """Blends with a degenerate image, tenths/10 of the image and the rest of the other, and beyond if tenths > 10.

    The other is black for brightness, grey scale for color, the mean grey for contrast, smoothed for sharpness; 10
    tenths leave the image as it is. The kind is an index into ``ENHANCEMENTS``.
    """
    pixels = image.astype(jnp.int32)
    grey = _luma(pixels)
    mean_grey = (2 * jnp.sum(grey) + grey.size) // (2 * grey.size)
    filled = partial(jnp.broadcast_to, shape=pixels.shape)
    degenerate = jnp.stack([pixels, jnp.zeros_like(pixels), filled(grey), filled(mean_grey), _smoothed(pixels)])[kind]
    blended = (10 - tenths) * degenerate + tenths * pixels
    return jnp.clip(blended // 10, 0, 255).astype(image.dtype)


def change_tone(image: jax.Array, kind: jax.Array, table: jax.Array) -> jax.Array:
    """Maps the 256 levels of each channel: by the table given, or by one made of the channel's own histogram.

    The kind is an index into ``TONES``; the table, int32 [256], is for the first.
    """

    def change_channel(channel: jax.Array) -> jax.Array:
        tables = jnp.stack([table, _autocontrast_table(channel), _equalization_table(channel)])
        return tables[kind][channel]

    return jax.vmap(change_channel, in_axes=-1, out_axes=-1)(image).astype(image.dtype)


def _luma(pixels: jax.Array) -> jax.Array:
    """Grey levels [height, width, 1], by the weights of ITU-R 601."""
    if pixels.shape[-1] == 1:
        return pixels
    weights = jnp.array([19595, 38470, 7471])  # .299, .587, .114 times 2¹⁶
    return (jnp.sum(weights * pixels, axis=-1, keepdims=True) + 2**15) >> 16


def _smoothed(pixels: jax.Array) -> jax.Array:
    """Each pixel the mean of its 3×3 neighbourhood, itself counted five times; the border as it was."""
    height, width, _ = pixels.shape
    neighbourhood = sum(pixels[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
    total = neighbourhood + 4 * pixels[1:-1, 1:-1]
    return pixels.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _autocontrast_table(channel: jax.Array) -> jax.Array:
    """Stretches the levels that occur over 0 to 255."""
    low, high = jnp.min(channel).astype(jnp.int32), jnp.max(channel).astype(jnp.int32)
    levels = jnp.arange(256)
    stretched = jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, levels)


def _equalization_table(channel: jax.Array) -> jax.Array:
    """Makes the histogram as flat as a map of levels can."""
    histogram = jnp.zeros(256, jnp.int32).at[channel.ravel()].add(1)
    step = (channel.size - histogram[jnp.max(channel)]) // 255
    below = jnp.cumsum(histogram) - histogram
    equalized = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, equalized, jnp.arange(256))
