"""Wide residual networks for 32×32 images.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016. Pre-activation blocks; without dropout, as for WRN-28-10
on CIFAR with flips and crops.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.layers import Layers


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


class WideResNet(nnx.Module):
    """WRN-depth-k.

    Args:
      num_classes: how many logits.
      depth: 6n + 4, with n blocks in each of three stages.
      widen_factor: k; the stages have 16k, 32k and 64k features.
      in_channels: of the images.
      dtype: in which the network computes; logits come in ``param_dtype``.
      param_dtype: in which parameters are kept.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 28,
        widen_factor: int = 10,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n ≥ 1, such as 10, 16, 28 or 40; got {depth}.")
        make = Layers(dtype, param_dtype, rngs)
        self.dtype = dtype
        self.conv = make.conv(in_channels, 16, 3)
        blocks = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * 2**stage * widen_factor
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(make, inputs, outputs, stride=2 if stage > 0 and index == 0 else 1))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.norm = make.batch_norm(inputs)
        self.head = make.head(inputs, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, in_channels]."""
        x = self.conv(x.astype(self.dtype))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x))
        return self.head(jnp.mean(x, axis=(1, 2)))
