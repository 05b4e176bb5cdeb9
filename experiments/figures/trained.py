"""Training runs as the measures see them: recipes, metrics, and the networks at the epochs that were kept."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments import logs
from experiments.checkpoints import Checkpoints, check
from experiments.configs import Run
from experiments.inputs import Signature
from experiments.logs import EpochRow
from experiments.optimizers import method_of
from experiments.program import make_program
from experiments.recipes import Recipe
from experiments.restore import read_recipe
from experiments.scale import start

# What may differ between runs that are drawn together.
_OWN = {"method", "seed", "sam", "asam", "crsam", "msam", "s2sam", "late_start", "learning_rate", "weight_decay"}

_FIRST = ("base", "sam", "crsam")


class Trained(NamedTuple):
    """One training run: its folder, its recipe, the method's label, and a row of metrics an epoch."""

    folder: Path
    recipe: Recipe
    label: str
    metrics: list[EpochRow]


class Snapshot(NamedTuple):
    """A network after an epoch: params, and the other state, which is BatchNorm's statistics."""

    epoch: int
    params: Any
    model_state: Any


def find_runs(folder: Path) -> list[Trained]:
    """The runs inside a folder: SGD, SAM, CR-SAM, then other methods, each by seed.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if they differ in more than method, seed and the methods' settings.
    """
    folders = {path.parent for name in ("config.json", "metrics.csv") for path in folder.glob(f"*/{name}")}
    found = [_open(path) for path in sorted(folders)]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no training runs. To train some: python -m experiments train NAME --keep-every 1"
        )
    _check_comparable(found)
    return sorted(found, key=_order)


def snapshots(run: Trained, signature: Signature, epochs: Sequence[int] = ()) -> list[Snapshot]:
    """The network at the given epochs, or at all that were kept.

    Raises:
      FileNotFoundError: if an epoch was not kept, with those that were.
    """
    per_epoch = signature.steps_per_epoch
    program = make_program(run.recipe, signature, start(Run(devices=1)))
    like = jax.eval_shape(program.init, 0)
    with contextlib.closing(Checkpoints(run.folder)) as checkpoints:
        kept = [step // per_epoch for step in checkpoints.steps if step % per_epoch == 0]
        missing = sorted(set(epochs) - set(kept))
        if missing:
            raise FileNotFoundError(f"{run.folder} kept no checkpoint of the epochs {missing}; there are {kept}.")
        states = [(epoch, checkpoints.restore(like, epoch * per_epoch)[0]) for epoch in epochs or kept]
    return [Snapshot(epoch, program.weights(state), state.model_state) for epoch, state in states]


def _open(folder: Path) -> Trained:
    check(folder)
    recipe = read_recipe(folder)
    return Trained(folder, recipe, method_of(recipe).label, logs.read_epochs(folder / "metrics.csv"))


def _check_comparable(runs: Sequence[Trained]) -> None:
    first, *others = (dataclasses.asdict(run.recipe) for run in runs)
    for run, other in zip(runs[1:], others, strict=True):
        changes = sorted(name for name in first.keys() - _OWN if first[name] != other[name])
        if changes:
            raise ValueError(
                f"{run.folder} and {runs[0].folder} cannot be drawn together: they differ in {', '.join(changes)}."
            )


def _order(run: Trained) -> tuple[int, str, int]:
    method = run.recipe.method
    return _FIRST.index(method) if method in _FIRST else len(_FIRST), method, run.recipe.seed
