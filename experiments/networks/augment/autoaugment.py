"""AutoAugment: the policy for CIFAR-10.

Cubuk, Zoph, Mané, Vasudevan, Le: AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019, tables 6 and 7.

An image takes one of 25 sub-policies, each of two steps (operation, probability, level). Under ``vmap`` a switch over
operations would compute all fourteen. But an operation moves pixels, or blends, or maps levels: so each step is one
of each kind, two of them the identity, and what tells operations apart is small tables of numbers.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks.augment.pixel_ops import ENHANCEMENTS, FIXED_POINT, TONES, change_tone, enhance, warp

POLICY = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
"""Sub-policies of two steps: operation, probability, level (0 where the operation has none)."""

MAX_LEVEL = 9


class Operation(NamedTuple):
    """An operation as its three parts, arrays of int32; see :mod:`experiments.networks.augment.pixel_ops`.

    Attributes:
      matrix: [2, 3], from where pixels come.
      enhancement: scalar, the degenerate image to blend with.
      tenths: scalar, how much of the image is in the blend.
      tone: scalar, where the table of levels comes from.
      table: [256], that table if it is a given one.
    """

    matrix: Any
    enhancement: Any
    tenths: Any
    tone: Any
    table: Any


def autoaugment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Applies the CIFAR-10 policy to uint8 images [batch, height, width, 1 or 3], each a sub-policy of its own.

    Magnitudes are table 6 of the paper's for levels 0 to 9, translations its 150 of 331 pixels in proportion and in
    whole pixels; shears, translations, rotations and enhancements take either sign. Empty pixels become grey.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"AutoAugment is defined on uint8 images, got {images.dtype}: augment before normalizing.")
    operations, probabilities = _tables(*images.shape[1:3])

    def augment(key: jax.Array, image: jax.Array) -> jax.Array:
        policy_key, sign_key, use_key = jax.random.split(key, 3)
        index = jax.random.randint(policy_key, (), 0, len(POLICY))
        is_negative = jax.random.bernoulli(sign_key, 0.5, (2,)).astype(jnp.int32)
        is_used = jax.random.uniform(use_key, (2,)) < probabilities[index]
        for step in range(2):
            operation = jax.tree.map(lambda table, step=step: table[index, step, is_negative[step]], operations)
            image = jnp.where(is_used[step], apply(operation, image), image)
        return image

    return jax.vmap(augment)(jax.random.split(key, len(images)), images)


def apply(operation: Operation, image: jax.Array) -> jax.Array:
    """Applies one operation to one uint8 image."""
    image = warp(image, operation.matrix)
    image = enhance(image, operation.enhancement, operation.tenths)
    return change_tone(image, operation.tone, operation.table)


def make_operation(name: str, level: int, sign: int, height: int, width: int) -> Operation:
    """An operation of a level, 0 to 9, in a direction, 1 or −1, on images of a size.

    AutoContrast, Equalize and Invert have no levels, and operations that map levels of brightness no direction.
    """
    is_enhancement = name in ENHANCEMENTS
    return Operation(
        matrix=_matrix(name, sign * level / MAX_LEVEL, height, width),
        enhancement=np.int32(ENHANCEMENTS.index(name) if is_enhancement else 0),
        tenths=np.int32(10 + sign * level if is_enhancement else 10),
        tone=np.int32(TONES.index(name) if name in TONES else 0),
        table=_table(name, level / MAX_LEVEL),
    )


def _matrix(name: str, strength: float, height: int, width: int) -> np.ndarray:
    """The position from which each pixel takes its value, in units of 2⁻¹⁶ pixels; a strength of ±1 is the largest."""
    matrix = np.eye(2, 3)
    match name:
        case "ShearX":
            matrix[0, 1] = 0.3 * strength
        case "ShearY":
            matrix[1, 0] = 0.3 * strength
        case "TranslateX":
            matrix[0, 2] = np.trunc(150 / 331 * width * strength)
        case "TranslateY":
            matrix[1, 2] = np.trunc(150 / 331 * height * strength)
        case "Rotate":
            angle = np.deg2rad(30 * strength)
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            center = np.array([width / 2, height / 2])
            matrix = np.column_stack([rotation, center - rotation @ center])
    matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2  # from pixel indices instead of their centres
    return np.floor(matrix * 2**FIXED_POINT + 0.5).astype(np.int32)


def _table(name: str, strength: float) -> np.ndarray:
    levels = np.arange(256, dtype=np.int32)
    match name:
        case "Invert":
            return 255 - levels
        case "Solarize":
            return np.where(levels < 256 * (1 - strength), levels, 255 - levels)
        case "Posterize":
            return levels & -(2 ** round(4 * strength))
    return levels


def _tables(*size: int) -> tuple[Operation, jax.Array]:
    """Every operation of the policy, stacked to [sub-policy, step, sign, ...], and probabilities [sub-policy, step]."""
    steps = itertools.chain(*POLICY)
    rows = [make_operation(name, level, sign, *size) for name, _, level in steps for sign in (1, -1)]
    shape = (len(POLICY), 2, 2)
    operations = jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts).reshape(*shape, *parts[0].shape)), *rows)
    return operations, jnp.array([[probability for _, probability, _ in subpolicy] for subpolicy in POLICY])
