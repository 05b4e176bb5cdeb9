"""Vision transformers.

Dosovitskiy et al.: An Image is Worth 16×16 Words, ICLR 2021. A class token, learned positions, pre-normalization,
and a linear head that starts at zero; without dropout.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.networks.layers import Layers, Shape


class EncoderBlock(nnx.Module):
    """Self-attention and a two-layer perceptron, each after a normalization and around an identity."""

    def __init__(self, make: Layers, width: int, num_heads: int):
        given, kernel_init, bias_init = make._asdict(), nnx.initializers.xavier_uniform(), nnx.initializers.normal(1e-6)
        self.norm1 = nnx.LayerNorm(width, **given)
        self.attention = nnx.MultiHeadAttention(num_heads, width, kernel_init=kernel_init, decode=False, **given)
        self.norm2 = nnx.LayerNorm(width, **given)
        self.linear1 = nnx.Linear(width, 4 * width, kernel_init=kernel_init, bias_init=bias_init, **given)
        self.linear2 = nnx.Linear(4 * width, width, kernel_init=kernel_init, bias_init=bias_init, **given)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """ViT with a class token.

    Args:
      patch_size: side of a patch in pixels; patches must tile the images.
      width: features of a token.
      depth: how many encoder blocks.
      num_heads: of the self-attention; they divide ``width``.
    """

    def __init__(
        self,
        make: Layers,
        num_classes: int,
        image_shape: Shape,
        *,
        patch_size: int,
        width: int,
        depth: int = 12,
        num_heads: int,
    ):
        height, image_width, channels = image_shape
        if height % patch_size or image_width % patch_size:
            raise ValueError(
                f"Patches of {patch_size}×{patch_size} pixels do not tile an image of {height}×{image_width}: "
                "resize or crop the images, or take another patch size."
            )
        tokens = (height // patch_size) * (image_width // patch_size) + 1
        patch = (patch_size, patch_size)
        self.embed = nnx.Conv(channels, width, patch, strides=patch, padding="VALID", **make._asdict())
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(make.rngs.params(), (1, tokens, width), jnp.float32))
        self.blocks = nnx.List(EncoderBlock(make, width, num_heads) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, **make._asdict())
        self.head = make.head(width, num_classes, kernel_init=nnx.initializers.zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        x = self.embed(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        class_token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1) + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
