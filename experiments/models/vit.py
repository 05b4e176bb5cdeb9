"""Vision transformers.

Dosovitskiy et al.: An Image is Worth 16×16 Words, ICLR 2021. A class token, learned positions, pre-normalization,
and a linear head that starts at zero; without dropout.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class EncoderBlock(nnx.Module):
    """Self-attention and a two-layer perceptron, each after a normalization and around an identity."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        kernel_init = nnx.initializers.xavier_uniform()
        small = nnx.initializers.normal(1e-6)
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, kernel_init=kernel_init, decode=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear1 = nnx.Linear(
            width, mlp_width, kernel_init=kernel_init, bias_init=small, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.linear2 = nnx.Linear(
            mlp_width, width, kernel_init=kernel_init, bias_init=small, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.linear2(nnx.gelu(self.linear1(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """ViT with a class token.

    Args:
      num_classes: how many logits.
      image_shape: height, width and channels of the images; patches must tile them.
      patch_size: side of a patch in pixels.
      width: features of a token.
      depth: how many encoder blocks.
      num_heads: of the self-attention; they divide ``width``.
      dtype: in which the network computes; logits come in ``param_dtype``.
      param_dtype: in which parameters are kept.
      rngs: where initial values come from.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        *,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, image_width, channels = image_shape
        if height % patch_size or image_width % patch_size:
            raise ValueError(
                f"Patches of {patch_size}×{patch_size} pixels do not tile an image of {height}×{image_width}: "
                "resize or crop the images, or take another patch size."
            )
        num_patches = (height // patch_size) * (image_width // patch_size)
        patch = (patch_size, patch_size)
        self.dtype = dtype
        self.embed = nnx.Conv(
            channels, width, patch, strides=patch, padding="VALID", dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, width), param_dtype))
        self.positions = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, num_patches + 1, width), param_dtype)
        )
        self.blocks = nnx.List(
            [
                EncoderBlock(width, num_heads, 4 * width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.head = nnx.Linear(  # in param_dtype: a loss of rounded logits would be rounded itself
            width,
            num_classes,
            kernel_init=nnx.initializers.zeros,
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        x = self.embed(x.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        class_token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([class_token, x], axis=1) + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
