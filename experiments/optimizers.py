"""A recipe's optimizer: the sharpness-aware gradient first, then weight decay, momentum and step size."""

from collections.abc import Callable
from typing import Any

import optax

from experiments.methods import METHODS, Method
from experiments.names import unknown
from experiments.recipes import Recipe

NAMES = ("base", *(name for name in METHODS if name not in ("sgd", "sgd-3x")))
"""Methods of a recipe. The base optimizer may be AdamW, and ``epochs`` says how long to train."""


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names.

    Raises:
      ValueError: if there is none, with the close names.
    """
    if recipe.method not in NAMES:
        raise unknown("method", recipe.method, NAMES)
    if recipe.method == "base":
        return METHODS["sgd"]._replace(label="SGD" if recipe.optimizer == "sgd" else "AdamW")
    return METHODS[recipe.method]


def learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
    """Linear warm-up, then half a cosine to zero at the last step."""
    steps = recipe.epochs * steps_per_epoch
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if not 0 <= warmup < steps:
        raise ValueError(f"A warm-up of {recipe.warmup_epochs} epochs does not fit into {recipe.epochs}.")
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else recipe.learning_rate, recipe.learning_rate, warmup, steps
    )


def optimizer(
    recipe: Recipe, loss_fn: Callable[..., Any], steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The method and its base as one optax chain."""
    schedule = learning_rate(recipe, steps_per_epoch)
    if recipe.optimizer == "adamw":
        base = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=recipe.weight_decay)
    else:
        base = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay), optax.sgd(schedule, momentum=recipe.momentum)
        )
    return optax.with_extra_args_support(method_of(recipe).build(loss_fn, recipe, base, schedule))
