"""EfficientNet-Lite0, from images [batch, height, width, channels] to logits.

Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019. The Lite variant of 2020
is their B0 for small devices: ReLU6 for swish, no squeeze-and-excitation, the stem and the head of fixed width. Here
it is without dropout and stochastic depth.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.networks.layers import Layers, Shape

_NORM: dict[str, Any] = {"momentum": 0.99, "epsilon": 1e-3}  # as the published weights were trained


class Stage(NamedTuple):
    """The blocks of one stage: the first of them strides."""

    expansion: int
    features: int
    kernel: int
    stride: int


STAGES = (
    Stage(1, 16, 3, 1),
    Stage(6, 24, 3, 2),
    Stage(6, 40, 5, 2),
    Stage(6, 80, 3, 2),
    Stage(6, 112, 5, 1),
    Stage(6, 192, 5, 2),
    Stage(6, 320, 3, 1),
)


class DepthwiseConv(nnx.Module):
    """A convolution of each feature by itself, without bias, padded as "SAME".

    It is a sum of shifted images, one for each pixel of the kernel. On a CPU XLA's own convolution of many groups, with
    its gradients, takes many times as long.
    """

    def __init__(self, make: Layers, features: int, kernel: int, stride: int):
        # Every output sees one input, so that fan-in is what he_normal takes fan-out for.
        init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(make.rngs.params(), (kernel, kernel, 1, features), jnp.float32))
        self.stride, self.dtype = stride, make.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride, (height, width) = self.kernel[...].astype(self.dtype), self.stride, x.shape[1:3]
        pads = jax.lax.padtype_to_pads((height, width), kernel.shape[:2], (stride, stride), "SAME")
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *pads, (0, 0)))
        places = itertools.product(*map(range, kernel.shape[:2]))
        shifted = (x[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0] for i, j in places)
        return functools.reduce(jnp.add, shifted)


class InvertedBottleneck(nnx.Module):
    """A 1×1 convolution that widens, a depthwise one, and a 1×1 one that narrows; around an identity if shapes agree.

    Where nothing is widened, the first convolution is left out. Nothing is rectified after the last.
    """

    def __init__(self, make: Layers, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        width = expansion * inputs
        self.is_expanded, self.is_identity = expansion > 1, stride == 1 and inputs == outputs
        if self.is_expanded:
            self.expand = make.conv(inputs, width, 1)
            self.norm1 = make.batch_norm(width, **_NORM)
        self.depthwise = DepthwiseConv(make, width, kernel, stride)
        self.norm2 = make.batch_norm(width, **_NORM)
        self.project = make.conv(width, outputs, 1)
        self.norm3 = make.batch_norm(outputs, **_NORM)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu6(self.norm1(self.expand(x))) if self.is_expanded else x
        y = nnx.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.is_identity else y


class EfficientNet(nnx.Module):
    """EfficientNet-Lite0: of 4,652,008 parameters for 1,000 classes.

    Strided convolutions are padded as TensorFlow does, more at the end than at the start: the published weights were
    trained so.

    Args:
      stage_sizes: blocks in each stage; with fewer stages the last ones are left out.
    """

    def __init__(
        self,
        make: Layers,
        num_classes: int,
        image_shape: Shape,
        *,
        stage_sizes: Sequence[int],
    ):
        if not 1 <= len(stage_sizes) <= len(STAGES):
            raise ValueError(f"stage_sizes must be of 1 to {len(STAGES)} stages, got {len(stage_sizes)}.")
        width = 32
        self.conv1 = make.conv(image_shape[-1], width, 3, 2, padding="SAME")
        self.norm1 = make.batch_norm(width, **_NORM)
        blocks = []
        for stage, size in zip(STAGES, stage_sizes, strict=False):
            for index in range(size):
                stride = 1 if index else stage.stride
                blocks.append(InvertedBottleneck(make, width, stage.features, stage.kernel, stride, stage.expansion))
                width = stage.features
        self.blocks = nnx.List(blocks)
        self.conv2 = make.conv(width, 1280, 1)
        self.norm2 = make.batch_norm(1280, **_NORM)
        self.head = make.head(1280, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.norm1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.norm2(self.conv2(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))
