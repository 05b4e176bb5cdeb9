"""What is compared: steps of optax's SAM, this library's, and CR-SAM in each strategy, on one network and batch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import crsam_jax
from experiments.networks import network
from experiments.settings.configs import Benchmark
from experiments.system import tables

LossFn = Callable[..., tuple[jax.Array, Any]]
"""``(params, model_state, images, labels) -> loss, new model state``."""

Strategy = Literal["auto", "sequential", "ordered", "vmap"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

_CLASSES = 10


class Method(NamedTuple):
    """An optimizer, its number of points, which is its floor, and whether devices are divided among the points."""

    name: str
    tx: optax.GradientTransformationExtraArgs
    points: int
    has_probe_axis: bool = False


def methods(loss_fn: LossFn, base: optax.GradientTransformation) -> list[Method]:
    """The sharpness-aware methods, each followed by ``base``."""
    return [
        Method("optax.contrib.sam", optax_sam(loss_fn, base), 2),
        Method("sam", optax.chain(crsam_jax.sam(loss_fn, has_aux=True), base), 2),
        *(Method(f"crsam, {how}", optax.chain(crsam(loss_fn, how), base), 3) for how in STRATEGIES),
    ]


def crsam(
    loss_fn: LossFn, strategy: Strategy = "auto", probe_axis: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """CR-SAM in a strategy; with a probe axis, each group of devices evaluates one perturbed point."""
    execution = crsam_jax.Execution(strategy, probe_axis=probe_axis)
    return crsam_jax.crsam(loss_fn, execution=execution, has_aux=True)


def optax_sam(loss_fn: LossFn, base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Optax's SAM in opaque mode, called like the methods here, for the same ρ as :func:`crsam_jax.sam`'s default."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    sam = optax.contrib.sam(base, adversary, opaque_mode=True)

    def update(updates: Any, state: Any, params: Any = None, *, loss: Any, **inputs: Any) -> tuple[Any, Any]:
        gradient = lambda params, _: jax.grad(loss_fn, has_aux=True)(params, **inputs)[0]
        return sam.update(updates, state, params, grad_fn=gradient)

    return optax.GradientTransformationExtraArgs(sam.init, update)


def make_step(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """From params, model state, optimizer state and a batch to updates, the next states, and the loss."""

    def step(params: Any, model_state: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, jax.Array]:
        inputs = {"model_state": model_state, **batch}
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, **inputs)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, **inputs)
        return updates, model_state, opt_state, loss

    return step


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """From params, model state, optimizer state and a batch to the next of the three, and the loss."""
    step = make_step(loss_fn, tx)

    def train(params: Any, model_state: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, jax.Array]:
        updates, model_state, opt_state, loss = step(params, model_state, opt_state, batch)
        return optax.apply_updates(params, updates), model_state, opt_state, loss

    return train


def write(config: Benchmark, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows to the file that was asked for, if one was."""
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        tables.write(config.out, rows)


def make_loss(config: Benchmark) -> LossFn:
    """The mean cross-entropy of a batch."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _network(config)))

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    return loss_fn


def initial(config: Benchmark) -> tuple[Any, Any]:
    """Params, and the network's other state."""
    model = _network(config)
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))


def batch(config: Benchmark) -> dict[str, jax.Array]:
    """Random images, in the network's dtype, and labels."""
    images, labels = jax.random.split(jax.random.key(0))
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    return {
        "images": jax.random.normal(images, shape, jnp.dtype(config.dtype)),
        "labels": jax.random.randint(labels, (config.batch_size,), 0, _CLASSES),
    }


def _network(config: Benchmark) -> nnx.Module:
    options = {"width": config.width, "depth": config.depth}
    options = {name: value for name, value in options.items() if value is not None}
    shape = (config.image_size, config.image_size, 3)
    return network.build(config.model, _CLASSES, shape, nnx.Rngs(0), jnp.dtype(config.dtype), **options)
