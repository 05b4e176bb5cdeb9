"""Pyramidal residual networks for 32×32 images.

Han, Kim, Kim: Deep Pyramidal Residual Networks, CVPR 2017. The additive form with basic blocks: PyramidNet-110 of
widening α = 270 has 28.5 million parameters with them (the deeper PyramidNet-164, -200, -272 use bottlenecks).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Layers


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
        self.stride = stride
        self.new_features = outputs - inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(self.norm1(x))
        y = self.norm3(self.conv2(nnx.relu(self.norm2(y))))
        if self.stride == 2:
            x = nnx.avg_pool(  # type: ignore[no-untyped-call]
                x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False
            ).astype(x.dtype)  # counting the pixels made it float32
        return y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.new_features)))


class PyramidNet(nnx.Module):
    """Additive PyramidNet: block k of N has 16 + αk/N features.

    Args:
      num_classes: how many logits.
      depth: 6n + 2, with n blocks in each of three stages, N = 3n.
      alpha: the widening factor α.
      in_channels: of the images.
      dtype: in which the network computes; logits come in ``param_dtype``.
      param_dtype: in which parameters are kept.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 110,
        alpha: int = 270,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n ≥ 1, such as 8, 20, 56 or 110; got {depth}.")
        make = Layers(dtype, param_dtype, rngs)
        self.dtype = dtype
        self.conv = make.conv(in_channels, 16, 3)
        self.norm1 = make.batch_norm(16)
        stage_size = (depth - 2) // 6
        blocks = []
        inputs = 16
        for index in range(3 * stage_size):
            outputs = round(16 + alpha * (index + 1) / (3 * stage_size))
            stride = 2 if index in (stage_size, 2 * stage_size) else 1
            blocks.append(PyramidBlock(make, inputs, outputs, stride))
            inputs = outputs
        self.blocks = nnx.List(blocks)
        self.norm2 = make.batch_norm(inputs)
        self.head = make.head(inputs, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, in_channels]."""
        x = self.norm1(self.conv(x.astype(self.dtype)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm2(x))
        return self.head(jnp.mean(x, axis=(1, 2)))
