"""The compiled part of a training run: its state, one step and one evaluation, over a mesh of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from experiments import models
from experiments.augment import augment, normalize
from experiments.inputs import Batch, Signature
from experiments.models.convnet import ConvNet
from experiments.optimizers import learning_rate, optimizer
from experiments.recipes import Recipe


class State(NamedTuple):
    """All that the next step depends on, beside the data; what a checkpoint holds.

    Attributes:
      step: steps taken so far, int32.
      rng: data of the key that the augmentations of every step derive from.
      params: the network's parameters.
      model_state: its other state, BatchNorm's statistics.
      opt_state: the optimizer's state.
      loss: of the last step's batch, before the step.
      loss_sum: of the epoch so far, one loss a step.
      correct: training examples classified rightly in the epoch so far, at the weights of their step.
      bad_step: the first step whose loss was not finite, or −1.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    loss: jax.Array
    loss_sum: jax.Array
    correct: jax.Array
    bad_step: jax.Array


class Program(NamedTuple):
    """Jitted functions, compiled once for all seeds.

    Attributes:
      init: from a seed to the first state.
      step: from a state (donated) and a feed to the next state.
      evaluate: from params, model state, a batch, and which classes may be answered (or None: all), to the sum of
        losses, right answers and examples.
      loss_fn: the training loss, ``(params, model_state, images, labels) -> loss, (model state, right answers)``.
      schedule: the learning rate of each step.
    """

    init: Callable[[int], State]
    step: Any  # what jit returns: readiness lowers it
    evaluate: Callable[[Any, Any, Batch, ArrayLike | None], jax.Array]
    loss_fn: Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]
    schedule: optax.Schedule


def make_program(
    recipe: Recipe, signature: Signature, mesh: Mesh, select: Callable[[Any, jax.Array], Batch] = lambda feed, _: feed
) -> Program:
    """Builds network, loss, optimizer and step of a recipe.

    Args:
      recipe: the run.
      signature: of its data.
      mesh: one axis, ``"data"``; the state is on every device, a batch is divided among them.
      select: from what ``step`` is fed with, and the step's number, to a batch of uint8 images.

    Returns:
      The program.
    """
    everywhere = NamedSharding(mesh, P())
    make_model = partial(make_network, recipe, signature)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(0)))
    groups = mesh.size if recipe.batch_norm == "device" else 1
    loss_fn = _mean_over_parts(_loss(graphdef), recipe.accumulate, groups)
    tx = optimizer(recipe, loss_fn, signature.steps_per_epoch)
    on_device = "none" if recipe.dataset == "imagenet2012" else recipe.augmentation  # ImageNet's is the pipeline's

    @partial(jax.jit, out_shardings=everywhere)
    def init(seed: int) -> State:
        model = make_model(seed)
        params, model_state = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
        rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
        none = jnp.zeros((), jnp.int32)
        return State(none, rng, params, model_state, tx.init(params), jnp.zeros(()), jnp.zeros(()), none, none - 1)

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def step(state: State, feed: Any) -> State:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        images, labels = select(feed, state.step)
        images = augment(on_device, key, images, signature.mean, signature.std)
        # The model's other state is that before the clean pass for all evaluations of a step.
        inputs = {"model_state": state.model_state, "images": images, "labels": labels}
        (loss, (model_state, correct)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, **inputs)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **inputs)
        is_first = state.step % signature.steps_per_epoch == 0
        return State(
            state.step + 1,
            state.rng,
            optax.apply_updates(state.params, updates),
            model_state,
            opt_state,
            loss,
            jnp.where(is_first, 0, state.loss_sum) + loss,
            jnp.where(is_first, 0, state.correct) + correct,
            jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step),
        )

    @partial(jax.jit, out_shardings=everywhere)
    def evaluate(params: Any, model_state: Any, batch: Batch, classes: ArrayLike | None) -> jax.Array:
        images, labels = batch
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.eval()
        logits = model(normalize(images, signature.mean, signature.std))
        logits = logits if classes is None else jnp.where(classes, logits, -jnp.inf)
        is_real = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(is_real, labels, 0))
        is_right = jnp.argmax(logits, -1) == labels
        return jnp.stack([jnp.sum(jnp.where(is_real, losses, 0)), jnp.sum(is_right), jnp.sum(is_real)])

    return Program(init, step, evaluate, loss_fn, learning_rate(recipe, signature.steps_per_epoch))


def make_network(recipe: Recipe, signature: Signature, seed: int) -> nnx.Module:
    """The network of a recipe, with the initial values of a seed."""
    shape, rngs, options = signature.image_shape, nnx.Rngs(jax.random.key(seed)), dict[str, Any](recipe.model_options)
    if recipe.model == "convnet":
        return ConvNet(shape[-1], signature.num_classes, **options, rngs=rngs)
    dtype = jnp.dtype(recipe.dtype)
    return models.build(recipe.model, signature.num_classes, shape, rngs, dtype, **options)


def _loss(graphdef: Any) -> Callable[..., Any]:
    """Mean cross-entropy of a batch in training mode, with the new model state and the number of right answers."""

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.train()
        logits = model(images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), jnp.sum(jnp.argmax(logits, -1) == labels))

    return loss_fn


def _mean_over_parts(loss_fn: Callable[..., Any], accumulate: int, groups: int) -> Callable[..., Any]:
    """The loss of a batch as the mean over its parts, each with BatchNorm statistics of its own.

    Args:
      loss_fn: of a part.
      accumulate: parts that pass the network one after the other, for the memory of one; each has examples from every
        device. Their activations are computed again in the backward pass.
      groups: parts of each that pass together, as many as devices.

    Returns:
      A loss with the same signature. It is one function of the whole batch, and so its perturbation is.
    """
    if groups > 1:
        loss_fn = _mean_over_groups(loss_fn, groups)
    return _mean_over_sequence(loss_fn, accumulate) if accumulate > 1 else loss_fn


def _mean_over_groups(loss_fn: Callable[..., Any], groups: int) -> Callable[..., Any]:
    def loss_of_groups(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        parts = (x.reshape(groups, -1, *x.shape[1:]) for x in (images, labels))
        losses, (states, correct) = jax.vmap(loss_fn, in_axes=(None, None, 0, 0))(params, model_state, *parts)
        return jnp.mean(losses), (_mean(states), jnp.sum(correct))

    return loss_of_groups


def _mean_over_sequence(loss_fn: Callable[..., Any], count: int) -> Callable[..., Any]:
    def loss_of_sequence(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        @jax.checkpoint
        def of_part(part: Batch) -> tuple[jax.Array, Any]:
            return loss_fn(params, model_state, *part)

        # Every count-th example, so that each device keeps what it has.
        parts = tuple(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for x in (images, labels))
        losses, (states, correct) = jax.lax.map(of_part, parts)
        return jnp.mean(losses), (_mean(states), jnp.sum(correct))

    return loss_of_sequence


def _mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
