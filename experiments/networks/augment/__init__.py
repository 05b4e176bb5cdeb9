"""Augmentations of the paper, on the device: pure functions of a key and a batch, to be jitted with the step."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.networks.augment.autoaugment import autoaugment
from experiments.networks.augment.basic import basic, cutout, random_flip
from experiments.networks.augment.inception import inception_crop
from experiments.settings.suggestions import unknown

NAMES = ("none", "basic", "cutout", "autoaugment", "inception")


def augment(
    name: str,
    key: jax.Array,
    images: jax.Array,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Augments a batch of uint8 images [batch, height, width, channels] and normalizes it, see :func:`normalize`.

    Args:
      name: ``"none"``; ``"basic"`` (crop and flip); ``"cutout"`` (basic, then cutout of 16×16 pixels);
        ``"autoaugment"`` (basic, then the CIFAR-10 policy); ``"inception"`` (Inception-style crop and flip).
      mean, std: of each channel, for pixels in [0, 1].
    """
    first, second = jax.random.split(key)
    match name:
        case "none":
            return normalize(images, mean, std, dtype)
        case "basic":
            return normalize(basic(first, images), mean, std, dtype)
        case "cutout":
            return cutout(second, normalize(basic(first, images), mean, std, dtype))
        case "autoaugment":
            return normalize(autoaugment(second, basic(first, images)), mean, std, dtype)
        case "inception":
            return normalize(random_flip(first, inception_crop(second, images)), mean, std, dtype)
    raise unknown("augmentation", name, NAMES)


def normalize(
    images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """(images/255 − mean)/std, channel by channel; computed in float32 at least, returned in ``dtype``.

    Images of one channel get as many as mean and std have.

    Raises:
      TypeError: if the images are not uint8: they may be normalized already.

    Example:
      >>> print(normalize(jnp.array([[[[0], [255]]]], jnp.uint8), mean=(0.5,), std=(0.25,)).ravel())
      [-2.  2.]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"normalize takes uint8 images, got {images.dtype}.")
    wide = jnp.promote_types(dtype, jnp.float32)
    scale = 1 / (255 * jnp.asarray(std, wide))
    return ((images.astype(wide) - 255 * jnp.asarray(mean, wide)) * scale).astype(dtype)


def scaled(images: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Normalized images of a network's height and width, by bilinear interpolation if theirs differ.

    Example:
      >>> print(scaled(jnp.array([[[[0.0]], [[4.0]]]]), (4, 1, 1)).ravel())
      [0. 1. 3. 4.]
    """
    if images.shape[1:3] == shape[:2]:
        return images
    return jax.image.resize(images, (len(images), *shape[:2], images.shape[-1]), "bilinear")
