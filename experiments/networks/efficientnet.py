"""EfficientNet-Lite0, from images [batch, height, width, channels] to logits.

Tan, Le: EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019. The Lite variant of 2020
is their B0 for small devices: ReLU6 for swish, no squeeze-and-excitation, the stem and the head of fixed width. Here
it is without dropout and stochastic depth.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.networks.layers import Layers, Shape, he_normal

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution of each feature by itself, padded as "SAME".

    It is a sum of shifted images, one for each pixel of the kernel. On a CPU XLA's own convolution of many groups takes
    many times as long, and so do the gradients that jax derives from the sum. So the gradients are written out below.

    Args:
      x: images [batch, height, width, features].
      kernel: [height, width, 1, features], of the same dtype.
      stride: of both axes.

    Example:
      >>> depthwise(jnp.arange(4.0).reshape(1, 1, 4, 1), jnp.ones((1, 3, 1, 1)), 1).ravel()
      Array([1., 3., 6., 5.], dtype=float32)
    """
    return _forward(x, kernel, stride)[0]


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_shifts(jnp.pad(x, _pads(x, kernel, stride)), kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[jax.Array, jax.Array], grads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of both inputs.

    The images' gradient is a convolution too: of ``grads``, with zeros between the pixels if the stride is 2, with the
    kernel turned by 180°.
    """
    x, kernel = saved
    pads = _pads(x, kernel, stride)
    around = [(0, 0, 0)]
    for axis in (1, 2):
        size, low = kernel.shape[axis - 1], pads[axis][0]
        length = (grads.shape[axis] - 1) * stride + 1  # with the zeros between
        around.append((size - 1 - low, x.shape[axis] + low - length, stride - 1))
    padded_grads = jax.lax.pad(grads, jnp.zeros((), grads.dtype), [*around, (0, 0, 0)])
    of_images = _sum_of_shifts(padded_grads, kernel[::-1, ::-1], 1)
    shifts = _shifts(jnp.pad(x, pads), kernel.shape[:2], stride)
    of_kernel = jnp.stack([_sum_over_images(shifted * grads) for shifted in shifts])
    return of_images, of_kernel.reshape(kernel.shape)


depthwise.defvjp(_forward, _backward)


def _pads(x: jax.Array, kernel: jax.Array, stride: int) -> list[tuple[int, int]]:
    inner = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    return [(0, 0), *inner, (0, 0)]


def _shifts(x: jax.Array, sizes: tuple[int, ...], stride: int) -> Iterator[jax.Array]:
    """The padded images, shifted and strided, for each pixel of the kernel, row by row."""
    height, width = (length - size + 1 for length, size in zip(x.shape[1:3], sizes, strict=True))
    for i, j in itertools.product(*map(range, sizes)):
        yield x[:, i : i + height : stride, j : j + width : stride]


def _sum_of_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    pixels = kernel.reshape(-1, kernel.shape[-1])
    shifts = _shifts(x, kernel.shape[:2], stride)
    return functools.reduce(jnp.add, (shifted * pixel for shifted, pixel in zip(shifts, pixels, strict=True)))


def _sum_over_images(x: jax.Array) -> jax.Array:
    """The sum over all axes but the features. Halves are added, as XLA's own sum is not vectorized on a CPU."""
    for axis in (1, 2):
        while x.shape[axis] % 2 == 0:
            first, second = jnp.split(x, 2, axis)
            x = first + second
    return jnp.sum(x, (0, 1, 2))


class DepthwiseConv(nnx.Module):
    """A convolution of each feature by itself, without bias, padded as "SAME"."""

    def __init__(self, make: Layers, features: int, kernel: int, stride: int):
        # Every output sees one input, so that fan-in is what he_normal takes fan-out for.
        init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(make.rngs.params(), (kernel, kernel, 1, features), jnp.float32))
        self.stride, self.dtype = stride, make.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)


class PointwiseConv(nnx.Module):
    """A convolution of 1×1 pixels without bias, as one product of matrices.

    On a CPU its gradients take less time than XLA's convolution, which makes transposed copies of all images.
    """

    def __init__(self, make: Layers, inputs: int, outputs: int):
        self.kernel = nnx.Param(he_normal(make.rngs.params(), (1, 1, inputs, outputs), jnp.float32))
        self.dtype = make.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        product = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ self.kernel[0, 0].astype(self.dtype)
        return product.reshape(*x.shape[:-1], -1)


class InvertedBottleneck(nnx.Module):
    """A 1×1 convolution that widens, a depthwise one, and a 1×1 one that narrows; around an identity if shapes agree.

    Where nothing is widened, the first convolution is left out. Nothing is rectified after the last.
    """

    def __init__(self, make: Layers, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        width = expansion * inputs
        self.is_expanded, self.is_identity = expansion > 1, stride == 1 and inputs == outputs
        if self.is_expanded:
            self.expand = PointwiseConv(make, inputs, width)
            self.norm1 = make.batch_norm(width, **_NORM)
        self.depthwise = DepthwiseConv(make, width, kernel, stride)
        self.norm2 = make.batch_norm(width, **_NORM)
        self.project = PointwiseConv(make, width, outputs)
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
        self.conv2 = PointwiseConv(make, width, 1280)
        self.norm2 = make.batch_norm(1280, **_NORM)
        self.head = make.head(1280, num_classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.norm1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.norm2(self.conv2(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))
