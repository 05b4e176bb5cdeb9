"""Residual networks, with the stem of ImageNet or of CIFAR.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016. As everywhere today, a bottleneck
strides in its 3×3 convolution, and on 32×32 images the stem is one 3×3 convolution without pooling.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Layers


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

    def __init__(self, make: Layers, inputs: int, features: int, stride: int, zero_init_residual: bool):
        self.conv1 = make.conv(inputs, features, 3, stride)
        self.norm1 = make.batch_norm(features)
        self.conv2 = make.conv(features, features, 3)
        self.norm2 = make.batch_norm(features, zero_init=zero_init_residual)
        self.shortcut = Shortcut(make, inputs, features, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut; the last widens fourfold."""

    expansion = 4

    def __init__(self, make: Layers, inputs: int, features: int, stride: int, zero_init_residual: bool):
        outputs = features * self.expansion
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


class ResNet(nnx.Module):
    """A residual network.

    Args:
      stage_sizes: blocks in each stage; features double and the image halves from one stage to the next.
      block: ``BasicBlock`` or ``Bottleneck``.
      num_classes: how many logits.
      in_channels: of the images.
      width: features of the first stage.
      stem: ``"cifar"``, one 3×3 convolution, or ``"imagenet"``, a 7×7 one of stride 2 and max pooling.
      zero_init_residual: whether each block starts as its shortcut, the scale of its last normalization at zero.
      dtype: in which the network computes; logits come in ``param_dtype``.
      param_dtype: in which parameters are kept.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck],
        num_classes: int,
        *,
        in_channels: int = 3,
        width: int = 64,
        stem: Literal["cifar", "imagenet"] = "cifar",
        zero_init_residual: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}.")
        make = Layers(dtype, param_dtype, rngs)
        self.dtype = dtype
        self.is_imagenet = stem == "imagenet"
        self.conv = make.conv(in_channels, width, 7, 2) if self.is_imagenet else make.conv(in_channels, width, 3)
        self.norm = make.batch_norm(width)
        blocks = []
        inputs = width
        for stage, size in enumerate(stage_sizes):
            features = width * 2**stage
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(make, inputs, features, stride, zero_init_residual))
                inputs = features * block.expansion
        self.blocks = nnx.List(blocks)
        self.head = make.head(inputs, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, in_channels]."""
        x = nnx.relu(self.norm(self.conv(x.astype(self.dtype))))
        if self.is_imagenet:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # type: ignore[no-untyped-call]
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
