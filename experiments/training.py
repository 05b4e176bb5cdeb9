"""Training one network on the digits with one method, one jitted step at a time."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import crsam_jax
from experiments import configs
from experiments.data import digits
from experiments.data.dataset import Split
from experiments.data.subset import with_label_noise
from experiments.methods import METHODS, evaluations_per_step, settings_of, with_settings
from experiments.models.convnet import ConvNet


class EpochRecord(NamedTuple):
    """One row of the metrics file; losses are mean cross-entropies, accuracies are in percent."""

    method: str
    seed: int
    epoch: int
    train_loss: float
    """Mean over the epoch's batches, at the weights before each step, against the noisy labels."""
    train_accuracy: float
    """On the training images, against the noisy labels; evaluation mode, as all below."""
    test_loss: float
    test_accuracy: float
    grad_norm: float
    """‖∇L‖ over the whole training set with its noisy labels."""
    curvature: float
    """vᵀHv along v = ∇L/‖∇L‖ over the whole training set."""
    evaluations_per_step: float
    """Gradient evaluations, the mean over the steps so far."""
    seconds_per_step: float


class Task(NamedTuple):
    """The data of one run, on the device."""

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def make_task(config: configs.Digits, seed: int, evaluate_on: str = "test") -> Task:
    """The training split with the seed's wrong labels, and the clean split to evaluate on: "test" or "validation"."""
    data = digits.load(config.train_examples)
    noisy = with_label_noise(data.train, config.label_noise, digits.NUM_CLASSES, seed)
    return Task(_on_device(noisy), _on_device(getattr(data, evaluate_on)))


def epochs_of(config: configs.Digits, method: str) -> int:
    """Epochs that the method trains for."""
    return METHODS[method].epochs * config.epochs


def optimizer(
    config: configs.Digits, method: str, loss_fn: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The method as an optax chain: the sharpness-aware gradient first, then weight decay, momentum and step size."""
    steps = epochs_of(config, method) * (config.train_examples // config.batch_size)
    schedule = optax.cosine_decay_schedule(settings_of(config, method).learning_rate, steps)
    base = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=config.momentum))
    return optax.with_extra_args_support(METHODS[method].build(loss_fn, config, base, schedule))


class Program(NamedTuple):
    """The jitted functions of one method; each is compiled once and serves all seeds."""

    init: Callable[[int], tuple[Any, Any, Any]]
    """From a seed to params, the model's other state, and the optimizer's state."""
    step: Callable[..., tuple[Any, Any, Any, jax.Array]]
    """From a method's settings, these and a batch to the next ones and the loss before the step. The numbers in
    the settings are traced, so that a search over them compiles once."""
    measure: Callable[..., tuple[jax.Array, ...]]
    """From params, model state and a task to the numbers of an :class:`EpochRecord`, from train_accuracy on."""


class Network(NamedTuple):
    """The network's functions, the same for all methods."""

    init: Callable[[int], tuple[Any, Any]]
    """From a seed to params and the model's other state."""
    loss_fn: Callable[..., tuple[jax.Array, Any]]
    """In training mode: ``(params, model_state, batch) -> loss, new model state``."""
    measure: Callable[..., tuple[jax.Array, ...]]


@functools.cache
def make_network(width: int, probe_rho: float) -> Network:
    """Builds the network and its losses; ``measure`` is compiled once for all methods and seeds."""

    def make_model(seed: int) -> ConvNet:
        return ConvNet(1, digits.NUM_CLASSES, width, rngs=nnx.Rngs(seed))

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(0)))

    def init(seed: int) -> tuple[Any, Any]:
        model = make_model(seed)
        # The model's other state is split off before the clean pass: all probes of a step start from the same one.
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))

    def forward(params: Any, model_state: Any, images: jax.Array, is_training: bool) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.set_attributes(use_running_average=not is_training)
        logits = model(images)
        return logits, nnx.state(model, nnx.Not(nnx.Param))

    def loss_fn(params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, Any]:
        images, labels = batch
        logits, new_model_state = forward(params, model_state, images, is_training=True)
        return _cross_entropy(logits, labels), new_model_state

    def evaluation_loss(params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        images, labels = batch
        logits, _ = forward(params, model_state, images, is_training=False)
        return _cross_entropy(logits, labels), 100 * jnp.mean(jnp.argmax(logits, -1) == labels)

    probe = crsam_jax.crsam_gradient(evaluation_loss, rho=probe_rho, alpha=0.0, beta=0.0, has_aux=True)

    @jax.jit
    def measure(params: Any, model_state: Any, task: Task) -> tuple[jax.Array, ...]:
        _, train_accuracy = evaluation_loss(params, model_state, task.train)
        _, seen = probe(params, model_state=model_state, batch=task.train)
        test_loss, test_accuracy = evaluation_loss(params, model_state, task.test)
        return train_accuracy, test_loss, test_accuracy, seen.grad_norm, seen.curvature

    return Network(init, loss_fn, measure)


def make_program(config: configs.Digits, method: str) -> Program:
    """Builds the optimizer and the step of one method, around the network of all."""
    network = make_network(config.width, config.probe_rho)

    def init(seed: int) -> tuple[Any, Any, Any]:
        params, model_state = network.init(seed)
        return params, model_state, optimizer(config, method, network.loss_fn).init(params)

    @jax.jit
    def step(
        settings: configs.Settings, params: Any, model_state: Any, opt_state: Any, batch: Any
    ) -> tuple[Any, Any, Any, jax.Array]:
        tx = optimizer(with_settings(config, method, settings), method, network.loss_fn)
        (loss, new_model_state), grads = jax.value_and_grad(network.loss_fn, has_aux=True)(params, model_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params, model_state=model_state, batch=batch)
        return optax.apply_updates(params, updates), new_model_state, opt_state, loss

    return Program(init, step, network.measure)


def train(config: configs.Digits, method: str, seed: int, task: Task, program: Program) -> Iterator[EpochRecord]:
    """Trains one network and yields a record after each epoch.

    Raises:
      FloatingPointError: if the training loss is no longer finite.
    """
    params, model_state, opt_state = program.init(seed)
    settings = settings_of(config, method)
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs_of(config, method) + 1):
        losses, start = [], time.perf_counter()
        for batch in _batches(task.train, config.batch_size, rng):
            params, model_state, opt_state, loss = program.step(settings, params, model_state, opt_state, batch)
            losses.append(loss)
        train_loss = float(jnp.mean(jnp.stack(losses)))  # waits for the epoch's last step
        seconds = (time.perf_counter() - start) / len(losses)
        if not np.isfinite(train_loss):
            raise FloatingPointError(f"{method}, seed {seed}: the training loss is {train_loss} in epoch {epoch}.")
        measured = [float(value) for value in program.measure(params, model_state, task)]
        values = (train_loss, *measured, evaluations_per_step(method, opt_state), seconds)
        yield EpochRecord(method, seed, epoch, *values)


def _batches(data: Any, batch_size: int, rng: np.random.Generator) -> Iterator[Any]:
    """One epoch of shuffled full batches; what is left over sits out this epoch."""
    order = rng.permutation(len(data[0]))
    for i in range(len(order) // batch_size):
        index = order[i * batch_size : (i + 1) * batch_size]
        yield tuple(array[index] for array in data)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _on_device(split: Split) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(digits.normalized(split.images)), jnp.asarray(split.labels)
