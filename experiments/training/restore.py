"""A run from its folder: the recipe, the compiled functions and the state of a checkpoint, to measure with."""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from experiments.data.inputs import Inputs, open_inputs
from experiments.settings import overrides
from experiments.settings.configs import Run
from experiments.settings.recipes import Recipe
from experiments.training import devices
from experiments.training.checkpoints import Checkpoints
from experiments.training.program import Program, State, make_program


class Restored(NamedTuple):
    """A run as it was at one checkpoint, with the params to evaluate: see ``Program.weights``."""

    recipe: Recipe
    mesh: Mesh
    inputs: Inputs
    program: Program
    state: State


def read_recipe(folder: Path) -> Recipe:
    """The recipe of the run in a folder."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no config.json.")
    return overrides.find(str(path))


def restore(folder: Path, step: int | None = None, run: Run = Run()) -> Restored:  # noqa: B008
    """Opens a run at a checkpoint, the last by default; of ``run`` it takes the devices and the folder of the data."""
    recipe = read_recipe(folder)
    mesh = devices.start(run)
    inputs = open_inputs(recipe, mesh, run)
    program = make_program(recipe, inputs.signature, mesh)
    with closing(Checkpoints(folder, data=inputs.signature.data)) as checkpoints:
        state, _ = checkpoints.restore(program.init(recipe.seed), step)
    return Restored(recipe, mesh, inputs, program, state._replace(params=program.weights(state)))
