"""A recipe's optimizer: the sharpness-aware gradient first, then weight decay, momentum and step size."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from experiments.methods import METHODS, Method
from experiments.names import unknown
from experiments.recipes import Recipe


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names.

    Raises:
      ValueError: if there is none, with the close names.
    """
    if recipe.method not in METHODS:
        raise unknown("method", recipe.method, METHODS)
    method = METHODS[recipe.method]
    if recipe.method == "base":
        return method._replace(label="SGD" if recipe.optimizer == "sgd" else "AdamW")
    return method


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up; then half a cosine to zero at the last step, or the peak. The peak may be traced.

    Raises:
      ValueError: if the warm-up leaves no step.
    """
    steps = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup < steps:
        raise ValueError(f"A warm-up of {recipe.warmup_epochs} epochs does not fit into {recipe.epochs}.")
    if recipe.schedule == "constant":
        share = optax.linear_schedule(0.0 if warmup else 1.0, 1.0, warmup)
    else:
        share = optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, steps)
    return lambda step: jnp.asarray(recipe.learning_rate * share(step))


def optimizer(
    recipe: Recipe, loss_fn: Callable[..., Any], steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The method and its base as one optax chain. The numbers in the recipe may be traced."""
    schedule = learning_rate(recipe, steps_per_epoch)
    if recipe.optimizer == "adamw":
        base = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=recipe.weight_decay)
    else:
        base = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay), optax.sgd(schedule, momentum=recipe.momentum)
        )
    steps = recipe.epochs * steps_per_epoch
    return optax.with_extra_args_support(method_of(recipe).build(loss_fn, recipe, base, schedule, steps))


def evaluations_per_step(recipe: Recipe, opt_state: Any) -> float:
    """Gradient evaluations per step, from the count of full steps where a policy skips some."""
    full = method_of(recipe).evaluations
    full_steps = optax.tree.get_all_with_path(opt_state, "full_steps")
    if not full_steps:
        return float(full)
    [(_, taken)] = full_steps
    [(_, steps)] = optax.tree.get_all_with_path(opt_state, "steps")
    return 1 + (full - 1) * float(taken) / max(float(steps), 1)
