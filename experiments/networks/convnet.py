"""A small convolutional network with BatchNorm, for images of a few pixels."""

import jax
import jax.numpy as jnp
from flax import nnx


class ConvNet(nnx.Module):
    """Three 3×3 convolutions, each with BatchNorm and ReLU, a mean over the image, and a linear layer.

    The first has ``width`` channels; the second halves the image and doubles them, the third keeps it.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32, *, rngs: nnx.Rngs):
        widths = (channels, width, 2 * width, 2 * width)
        self.convs = nnx.List(
            nnx.Conv(widths[i], widths[i + 1], (3, 3), strides=2 if i == 1 else 1, use_bias=False, rngs=rngs)
            for i in range(3)
        )
        self.norms = nnx.List(nnx.BatchNorm(w, momentum=0.9, rngs=rngs) for w in widths[1:])
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = nnx.relu(norm(conv(images)))
        return self.head(jnp.mean(images, axis=(1, 2)))
