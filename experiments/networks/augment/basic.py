"""Flips, crops and cutout of batches [batch, height, width, channels], uint8 or floating; each image separately."""

import jax
import jax.numpy as jnp


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images, left to right."""
    is_flipped = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(is_flipped, images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Pads by zeros on every side, then cuts out an image of the old size at any of (2 padding + 1)² places."""
    size, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (size, 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, y, x: jax.lax.dynamic_slice(image, (y, x, 0), shape))(padded, *corners.T)


def basic(key: jax.Array, images: jax.Array) -> jax.Array:
    """Random crop after padding by 4 pixels, and random flip: the standard of CIFAR (He et al. 2016)."""
    flip_key, crop_key = jax.random.split(key)
    return random_flip(flip_key, random_crop(crop_key, images))


def cutout(key: jax.Array, images: jax.Array, size: int = 16) -> jax.Array:
    """Sets a square of an even side to zero, the mean of normalized images (DeVries, Taylor 2017: Cutout).

    Its centre is any pixel, so that up to three quarters of it lie outside of the image.
    """
    count, height, width, _ = images.shape
    y_key, x_key = jax.random.split(key)
    is_row_cut = _interval(jax.random.randint(y_key, (count, 1), 0, height), size, height)
    is_column_cut = _interval(jax.random.randint(x_key, (count, 1), 0, width), size, width)
    is_cut = is_row_cut[:, :, None] & is_column_cut[:, None, :]
    return jnp.where(is_cut[..., None], 0, images).astype(images.dtype)


def _interval(center: jax.Array, size: int, length: int) -> jax.Array:
    """Which of ``length`` pixels lie in [center − size/2, center + size/2); one row for each centre."""
    offset = jnp.arange(length) - center
    return (-(size // 2) <= offset) & (offset < size // 2)
