"""The compiled part of a training run: its state and one step, over a mesh of devices."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import crsam_jax
from experiments.data.inputs import Inputs, Signature, select
from experiments.networks import pretrained
from experiments.networks.augment import augment, scaled
from experiments.networks.network import LossFn, Network, make_network
from experiments.settings.recipes import NetworkSettings, Recipe
from experiments.training.judge import Judge, make_judge
from experiments.training.optimizers import learning_rate, method_of, optimizer

STATISTICS_EXAMPLES = 1000
"""Training images on which BatchNorm's statistics of averaged weights are measured, at most."""


class State(NamedTuple):
    """All that the next step depends on, except the data; a checkpoint holds it.

    Attributes:
      step: steps taken so far, int32.
      rng: data of the key that the augmentations of every step derive from.
      numbers: the recipe's traced settings, by dotted name.
      params: the network's parameters.
      model_state: its other state, BatchNorm's statistics.
      opt_state: the optimizer's state.
      average: of params and model state over the steps, if the recipe has ``ema`` or ``swa_start``, else None.
      loss: of the last step's batch, before the step.
      loss_sum: of the epoch so far, one loss per step.
      correct: training examples classified correctly in the epoch so far, at the weights of their step. If a method
        evaluates a part of each batch first, the part's count is scaled up.
      bad_step: the first step whose loss was not finite, or −1.
    """

    step: jax.Array
    rng: jax.Array
    numbers: dict[str, jax.Array]
    params: Any
    model_state: Any
    opt_state: Any
    average: optax.EmaState | None
    loss: jax.Array
    loss_sum: jax.Array
    correct: jax.Array
    bad_step: jax.Array


class Program(NamedTuple):
    """Jitted functions, compiled once for all seeds, and for all values of the traced settings.

    Attributes:
      init: from a seed to the first state.
      step: from a state (donated) and a feed to the next state.
      weights: from a state to the params to evaluate, average and export: without the shift of MSAM and S²-SAM.
      loss_fn: the training loss, see :data:`experiments.networks.network.LossFn`.
      judge: what the network is judged by, the same functions for all methods.
      schedule: the learning rate of each step.
    """

    init: Callable[..., State]
    step: Any  # what jit returns: readiness lowers it
    weights: Callable[[State], Any]
    loss_fn: LossFn
    judge: Judge
    schedule: optax.Schedule


def make_program(recipe: Recipe, signature: Signature, mesh: Mesh) -> Program:
    """Builds network, loss, optimizer and step of a recipe; recipes that differ in numbers alone share them.

    The state is on every device of the mesh; a batch is divided among them, along its one axis, ``"data"``.
    """
    program = _program(recipe.structure(), signature, mesh)
    optimizer(recipe, program.loss_fn, signature.steps_per_epoch)  # checks the numbers, which are traced in the step
    if recipe.batch_size % (mesh.size * recipe.accumulate * method_of(recipe).part):
        raise ValueError(f"{recipe.method} takes a part of each batch, and {recipe.batch_size} cannot be so divided.")
    if recipe.ema is not None and not 0 <= recipe.ema < 1:
        raise ValueError(f"ema must be in [0, 1), got {recipe.ema:g}.")
    numbers = {name: jnp.asarray(value, jnp.float32) for name, value in recipe.numbers.items()}
    weights = None if recipe.pretrained is None else pretrained.load()
    init = partial(program.init, numbers=numbers, weights=weights)
    return program._replace(init=init, schedule=learning_rate(recipe, signature.steps_per_epoch))


@functools.lru_cache(maxsize=32)  # on CPU a step of many kernels takes 150 MB and 1,200 of a process's 65,530 mappings
def _program(recipe: Recipe, signature: Signature, mesh: Mesh) -> Program:
    part, everywhere = method_of(recipe).part, NamedSharding(mesh, P())
    network, judge = _judged_network(recipe.network, signature, mesh)
    on_device = "none" if recipe.dataset == "imagenet2012" else recipe.augmentation  # ImageNet's is the pipeline's

    def optimizer_of(numbers: dict[str, jax.Array]) -> optax.GradientTransformationExtraArgs:
        return optimizer(recipe.with_numbers(numbers), network.loss_fn, signature.steps_per_epoch)

    def mean(state: State) -> optax.GradientTransformation:
        """Updates the average; from ``swa_start`` on all steps have the same weight, and before it the last has all."""
        if recipe.swa_start is None:
            return optax.ema(state.numbers["ema"])
        start = round(recipe.swa_start * recipe.epochs * signature.steps_per_epoch)
        seen = jnp.maximum(state.step - start, 0)
        return optax.ema(seen / (seen + 1), debias=False)

    @partial(jax.jit, out_shardings=everywhere)
    def unshifted(opt_state: Any, params: Any) -> Any:
        return crsam_jax.eval_params(opt_state, params) if method_of(recipe).is_shifted else params

    @partial(jax.jit, out_shardings=everywhere)
    def init(seed: int, numbers: dict[str, jax.Array], weights: pretrained.Weights | None) -> State:
        params, model_state = network.init(seed, weights)  # an input, so that the program does not hold them
        rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        is_averaged = "ema" in numbers or recipe.swa_start is not None
        average = optax.ema(0.0).init((params, model_state)) if is_averaged else None
        opt_state = optimizer_of(numbers).init(params)
        return State(none, rng, numbers, params, model_state, opt_state, average, zero, zero, none, none - 1)

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def step(state: State, feed: Any) -> State:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        images, labels = select(feed, state.step, mesh)
        images = augment(on_device, key, images, signature.mean, signature.std)
        images = scaled(images, signature.image_shape)  # after it: its crops are of the data's pixels
        # The model's other state is that before the clean pass for all evaluations of a step.
        inputs = {"model_state": state.model_state, "images": images, "labels": labels}
        if "label_smoothing" in state.numbers:
            inputs["label_smoothing"] = state.numbers["label_smoothing"]
        grad_fn = jax.value_and_grad(network.loss_fn, has_aux=True)
        # Of a batch that is divided among devices, every device has its share of the part.
        ascended = inputs | {"images": images[::part], "labels": labels[::part]}
        (loss, (model_state, correct)), grads = grad_fn(state.params, **ascended)
        tx = optimizer_of(state.numbers)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss, **inputs)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            _, average = mean(state).update((unshifted(opt_state, params), model_state), average)
        is_first = state.step % signature.steps_per_epoch == 0
        return state._replace(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            average=average,
            loss=loss,
            loss_sum=jnp.where(is_first, 0, state.loss_sum) + loss,
            correct=jnp.where(is_first, 0, state.correct) + part * correct,
            bad_step=jnp.where((state.bad_step < 0) & ~jnp.isfinite(loss), state.step + 1, state.bad_step),
        )

    def weights(state: State) -> Any:
        return unshifted(state.opt_state, state.params)

    return Program(init, step, weights, network.loss_fn, judge, learning_rate(recipe, signature.steps_per_epoch))


@functools.lru_cache(maxsize=32)
def _judged_network(settings: NetworkSettings, signature: Signature, mesh: Mesh) -> tuple[Network, Judge]:
    """A network and what judges it, compiled once for all methods."""
    network = make_network(settings, signature, groups=mesh.size if settings.batch_norm == "device" else 1)
    return network, make_judge(network, signature, mesh)


def averaged(state: State) -> tuple[Any, Any]:
    """The average of params and model state over the steps so far: weighted by powers of the decay, or SWA's."""
    if state.average is None:
        raise ValueError("This run has no averaged weights: train it with --ema or --swa-start.")
    mean = state.average.ema
    if "ema" in state.numbers:
        mean = optax.tree.bias_correction(mean, state.numbers["ema"], state.average.count)
    return jax.tree.map(lambda mean, like: mean.astype(like.dtype), mean, (state.params, state.model_state))


def averaged_network(state: State, program: Program, inputs: Inputs) -> tuple[Any, Any]:
    """The averaged params, and a model state with BatchNorm's statistics measured for them on training examples.

    Streamed data (ImageNet) has no such examples. Then the model state is averaged too.
    """
    params, model_state = averaged(state)
    examples = inputs.examples(STATISTICS_EXAMPLES)
    return params, model_state if examples is None else program.judge.remeasured(params, model_state, examples)
