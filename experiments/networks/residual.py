"""Residual networks: ResNets, wide ones and pyramidal ones, from images [batch, height, width, channels] to logits."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.networks.layers import Layers, Shape

_STEMS = {"cifar": (3, 1), "strided": (3, 2), "imagenet": (7, 2)}  # size and stride of the first convolution


class Shortcut(nnx.Module):
    """The identity where shapes agree, else a strided 1×1 convolution and its normalization."""

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int):
        self.is_identity = stride == 1 and inputs == outputs
        if not self.is_identity:
            self.conv = make.conv(inputs, outputs, 1, stride)
            self.norm = make.batch_norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.is_identity else self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int, zero_init_residual: bool):
        self.conv1 = make.conv(inputs, outputs, 3, stride)
        self.norm1 = make.batch_norm(outputs)
        self.conv2 = make.conv(outputs, outputs, 3)
        self.norm2 = make.batch_norm(outputs, zero_init=zero_init_residual)
        self.shortcut = Shortcut(make, inputs, outputs, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut; the last widens fourfold."""

    expansion = 4

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int, zero_init_residual: bool):
        features = outputs // self.expansion
        self.conv1 = make.conv(inputs, features, 1)
        self.norm1 = make.batch_norm(features)
        self.conv2 = make.conv(features, features, 3, stride)
        self.norm2 = make.batch_norm(features)
        self.conv3 = make.conv(features, outputs, 1)
        self.norm3 = make.batch_norm(outputs, zero_init=zero_init_residual)
        self.shortcut = Shortcut(make, inputs, outputs, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + self.shortcut(x))


class WideBlock(nnx.Module):
    """Normalize, rectify, convolve, twice. Where the shape changes, the shortcut starts from the rectified input."""

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int):
        self.norm1 = make.batch_norm(inputs)
        self.conv1 = make.conv(inputs, outputs, 3, stride)
        self.norm2 = make.batch_norm(outputs)
        self.conv2 = make.conv(outputs, outputs, 3)
        self.is_identity = stride == 1 and inputs == outputs
        if not self.is_identity:
            self.shortcut = make.conv(inputs, outputs, 1, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        activated = nnx.relu(self.norm1(x))
        y = self.conv2(nnx.relu(self.norm2(self.conv1(activated))))
        return y + (x if self.is_identity else self.shortcut(activated))


class PyramidBlock(nnx.Module):
    """Normalize, convolve, normalize, rectify, convolve, normalize; the shortcut has no parameters.

    Where the image halves, the shortcut is averaged over 2×2 pixels; the features that are new are zero in it.
    """

    def __init__(self, make: Layers, inputs: int, outputs: int, stride: int):
        self.norm1 = make.batch_norm(inputs)
        self.conv1 = make.conv(inputs, outputs, 3, stride)
        self.norm2 = make.batch_norm(outputs)
        self.conv2 = make.conv(outputs, outputs, 3)
        self.norm3 = make.batch_norm(outputs)
        self.stride, self.new_features = stride, outputs - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(self.norm1(x))
        y = self.norm3(self.conv2(nnx.relu(self.norm2(y))))
        if self.stride == 2:
            x = nnx.avg_pool(  # type: ignore[no-untyped-call]
                x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False
            ).astype(x.dtype)  # counting the pixels made it float32
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.new_features)))


class ResNet(nnx.Module):
    """He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.

    As everywhere today, a bottleneck strides in its 3×3 convolution, and on 32×32 images the stem is one 3×3
    convolution without pooling.

    Args:
      stage_sizes: blocks in each stage; features double and the image halves from one stage to the next.
      block: ``BasicBlock`` or ``Bottleneck``.
      width: features of the first stage.
      stem: ``"cifar"``, one 3×3 convolution; ``"strided"``, the same with stride 2; or ``"imagenet"``, a 7×7 one of
        stride 2 and max pooling.
      zero_init_residual: whether each block starts as its shortcut, the scale of its last normalization at zero.
    """

    def __init__(
        self,
        make: Layers,
        num_classes: int,
        image_shape: Shape,
        *,
        stage_sizes: Sequence[int],
        block: type[BasicBlock | Bottleneck],
        width: int = 64,
        stem: Literal["cifar", "strided", "imagenet"] = "cifar",
        zero_init_residual: bool = False,
    ):
        if stem not in _STEMS:
            raise ValueError(f"stem must be 'cifar', 'strided' or 'imagenet', got {stem!r}.")
        self.is_imagenet = stem == "imagenet"
        self.conv = make.conv(image_shape[-1], width, *_STEMS[stem])
        self.norm = make.batch_norm(width)
        stages = [stage for stage, size in enumerate(stage_sizes) for _ in range(size)]
        widths = [width, *(width * 2**stage * block.expansion for stage in stages)]
        self.blocks = _chain(partial(block, make, zero_init_residual=zero_init_residual), widths, stage_sizes)
        self.head = make.head(widths[-1], num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        if self.is_imagenet:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # type: ignore[no-untyped-call]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class WideResNet(nnx.Module):
    """WRN-depth-k, for 32×32 images: of depth 6n + 4 with n blocks in each of three stages of 16k, 32k, 64k features.

    Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016. Pre-activation blocks; without dropout, as for WRN-28-10
    on CIFAR with flips and crops.
    """

    def __init__(self, make: Layers, num_classes: int, image_shape: Shape, *, depth: int, widen_factor: int):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n ≥ 1, such as 10, 16, 28 or 40; got {depth}.")
        n = (depth - 4) // 6
        widths = [16, *(16 * widen_factor * 2 ** (index // n) for index in range(3 * n))]
        self.conv = make.conv(image_shape[-1], 16, 3)
        self.blocks = _chain(partial(WideBlock, make), widths, (n, n, n))
        self.norm = make.batch_norm(widths[-1])
        self.head = make.head(widths[-1], num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(nnx.relu(self.norm(x)), axis=(1, 2)))


class PyramidNet(nnx.Module):
    """Additive PyramidNet, for 32×32 images: of depth 6n + 2, where block k of N = 3n has 16 + αk/N features.

    Han, Kim, Kim: Deep Pyramidal Residual Networks, CVPR 2017. With basic blocks, of which PyramidNet-110 of α = 270
    has 28.5 million parameters (the deeper PyramidNet-164, -200, -272 use bottlenecks).
    """

    def __init__(self, make: Layers, num_classes: int, image_shape: Shape, *, depth: int, alpha: int):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n ≥ 1, such as 8, 20, 56 or 110; got {depth}.")
        n = (depth - 2) // 6
        widths = [round(16 + alpha * k / (3 * n)) for k in range(3 * n + 1)]
        self.conv = make.conv(image_shape[-1], 16, 3)
        self.norm1 = make.batch_norm(16)
        self.blocks = _chain(partial(PyramidBlock, make), widths, (n, n, n))
        self.norm2 = make.batch_norm(widths[-1])
        self.head = make.head(widths[-1], num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm1(self.conv(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(nnx.relu(self.norm2(x)), axis=(1, 2)))


def _chain(block: Callable[[int, int, int], nnx.Module], widths: Sequence[int], sizes: Sequence[int]) -> nnx.List[Any]:
    """Blocks from each width to the next; where a stage begins, but for the first, the image halves."""
    starts = set(itertools.accumulate(sizes[:-1]))
    strides = (2 if index in starts else 1 for index in range(len(widths) - 1))
    return nnx.List(map(block, widths, widths[1:], strides))
