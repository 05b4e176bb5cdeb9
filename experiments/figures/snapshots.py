"""Training runs as the measures see them: recipes, metrics, and the networks at the epochs that were kept."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.data.inputs import Signature
from experiments.settings.configs import Run
from experiments.settings.recipes import Recipe
from experiments.training.checkpoints import Checkpoints, check
from experiments.training.devices import start
from experiments.training.logs import EpochRow, read_epochs
from experiments.training.optimizers import method_of
from experiments.training.program import make_program
from experiments.training.restore import read_recipe

# What may differ between runs that are drawn together.
_OWN = {"method", "seed", "sam", "asam", "crsam", "msam", "s2sam", "late_start", "learning_rate", "weight_decay"}

_ORDER = {"base": 0, "sam": 1, "crsam": 2}


class Trained(NamedTuple):
    """One training run: its folder, its recipe, the method's label, and a row of metrics per epoch."""

    folder: Path
    recipe: Recipe
    label: str
    metrics: list[EpochRow]


class Snapshot(NamedTuple):
    """A network after an epoch: parameters and BatchNorm's statistics."""

    key: tuple[str, int, int]  # method, seed, epoch
    params: Any
    model_state: Any


def find_runs(folder: Path) -> list[Trained]:
    """The runs inside a folder: SGD, SAM, CR-SAM, then other methods, each by seed."""
    found = []
    for run in sorted({path.parent for name in ("config.json", "metrics.csv") for path in folder.glob(f"*/{name}")}):
        check(run)
        recipe = read_recipe(run)
        found.append(Trained(run, recipe, method_of(recipe).label, read_epochs(run / "metrics.csv")))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no training runs. To train some: python -m experiments train NAME --keep-every 1"
        )
    first, *others = found
    shared = sorted({field.name for field in dataclasses.fields(Recipe)} - _OWN)
    for other in others:
        if changes := [name for name in shared if getattr(other.recipe, name) != getattr(first.recipe, name)]:
            raise ValueError(
                f"{other.folder} and {first.folder} cannot be drawn together: they differ in {', '.join(changes)}."
            )
    return sorted(found, key=lambda run: (_ORDER.get(run.recipe.method, 3), run.recipe.method, run.recipe.seed))


def snapshots(run: Trained, signature: Signature, epochs: Sequence[int] = ()) -> list[Snapshot]:
    """The network at the given epochs, or at all that were kept."""
    per_epoch = signature.steps_per_epoch
    program = make_program(run.recipe, signature, start(Run(devices=1)))
    like = jax.eval_shape(program.init, 0)
    with contextlib.closing(Checkpoints(run.folder)) as checkpoints:
        kept = [step // per_epoch for step in checkpoints.steps if step % per_epoch == 0]
        if missing := sorted(set(epochs) - set(kept)):
            raise FileNotFoundError(f"{run.folder} kept no checkpoint of the epochs {missing}; there are {kept}.")
        states = {epoch: checkpoints.restore(like, epoch * per_epoch)[0] for epoch in epochs or kept}
    name = run.recipe.method, run.recipe.seed
    return [Snapshot((*name, epoch), program.weights(state), state.model_state) for epoch, state in states.items()]
