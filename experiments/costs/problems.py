"""The networks of the whole benchmark: two of the paper, a small dense one, and a small language model."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.costs import steps
from experiments.settings.configs import Benchmark


class Problem(NamedTuple):
    """A loss ``(params, model_state, **batch) -> loss, new model state``, and what makes its arguments."""

    loss_fn: steps.LossFn
    initial: Callable[[], tuple[Any, Any]]
    batch: Callable[[], dict[str, jax.Array]]
    examples: int
    """In a batch."""
    dtype: str


def images(model: str, batch_size: int, image_size: int, dtype: Any = "float32", width: int | None = None) -> Problem:
    """One of experiments.networks on random images."""
    config = Benchmark(model, width, batch_size=batch_size, image_size=image_size, dtype=dtype)
    return Problem(
        steps.make_loss(config), lambda: steps.initial(config), lambda: steps.batch(config), batch_size, dtype
    )


def dense(batch_size: int = 128, inputs: int = 64, width: int = 256, depth: int = 3) -> Problem:
    """A multilayer perceptron: small kernels, which leave a GPU idle."""

    def make() -> nnx.Module:
        rngs, widths = nnx.Rngs(0), [inputs, *[width] * depth]
        layers = [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        return nnx.Sequential(
            *[part for layer in layers for part in (layer, nnx.relu)], nnx.Linear(width, 10, rngs=rngs)
        )

    def batch() -> dict[str, jax.Array]:
        x, y = jax.random.split(jax.random.key(0))
        labels = jax.random.randint(y, (batch_size,), 0, 10)
        return {"images": jax.random.normal(x, (batch_size, inputs)), "labels": labels}

    return _classifier(make, batch, batch_size)


def language(
    batch_size: int = 32, length: int = 128, vocabulary: int = 1000, width: int = 256, depth: int = 4, heads: int = 4
) -> Problem:
    """A transformer that predicts the next token."""

    def batch() -> dict[str, jax.Array]:
        tokens = jax.random.randint(jax.random.key(0), (batch_size, length + 1), 0, vocabulary)
        return {"images": tokens[:, :-1], "labels": tokens[:, 1:]}

    return _classifier(lambda: Language(length, vocabulary, width, depth, heads, nnx.Rngs(0)), batch, batch_size)


class Language(nnx.Module):
    """From tokens (..., length) to logits (..., length, vocabulary)."""

    def __init__(self, length: int, vocabulary: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def _classifier(make: Callable[[], nnx.Module], batch: Callable[[], dict[str, jax.Array]], examples: int) -> Problem:
    graphdef = nnx.graphdef(nnx.eval_shape(make))

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    def initial() -> tuple[Any, Any]:
        model = make()
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))

    return Problem(loss_fn, initial, batch, examples, "float32")
