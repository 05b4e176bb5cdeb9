"""Training a recipe: it can be stopped at any moment, and resumes where it stopped."""

import contextlib
import dataclasses
import signal
import sys
from pathlib import Path

import jax
from rich.console import Console

from experiments import conditions, devices, ranges, run_folder, supervisor
from experiments.checkpoints import Checkpoints
from experiments.configs import Run
from experiments.inputs import note_of, open_inputs
from experiments.logs import Log
from experiments.loop import Training, run_steps
from experiments.program import make_program
from experiments.recipes import Recipe
from experiments.resume import check_not_lost, clear_way, resume


def train(name: str, recipe: Recipe, run: Run = Run(), quiet: bool = False) -> Path:  # noqa: B008
    """Trains one network. After any interruption the same call resumes.

    It ends as an uninterrupted run would, bit by bit on the same hardware.

    Args:
      name: of the recipe, for the folder.
      recipe: what to train.
      run: how.
      quiet: whether to print nothing.

    Returns:
      The folder with config.json, metrics.csv, steps.jsonl, TensorBoard events and checkpoints.

    Raises:
      FileExistsError: if the folder holds another run, or a complete one without a checkpoint, or another process is
        writing to it.
      FileNotFoundError: if the data is not there, with what to do.
      FloatingPointError: if a loss is not finite, with the step and the last checkpoint.
      ValueError: if a setting is out of its range, or all checkpoints of the run are damaged.
      OSError: if the folder cannot be written.
      SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    ranges.check(recipe, run)
    folder = run.out or Path("results") / name / f"{recipe.method}-{recipe.augmentation}-seed{recipe.seed}"
    try:
        return _train(name, recipe, run, folder, quiet)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # what is open has no name in its errors
            error.filename = str(folder)
        raise


def _train(name: str, recipe: Recipe, run: Run, folder: Path, quiet: bool) -> Path:
    mesh = devices.start(run)
    is_first = jax.process_index() == 0
    supervisor.tell(folder=str(folder))
    console = Console(quiet=quiet or not is_first, soft_wrap=True, highlight=False)
    run_folder.check_free(recipe, folder)
    check_not_lost(folder)
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(recipe, mesh, run)
        if note := note_of(recipe, run.data_dir):
            console.print(note)
        program = make_program(recipe, inputs.signature, mesh)
        devices.wait_for_all("checked")
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_folder.locked(folder))
            clear_way(folder)
            run_folder.save_config(recipe, folder)
            changed = conditions.changed(folder, mesh)
            conditions.note(folder, mesh)
        if not console.is_terminal:
            console.print("compiling ...")
        steps = inputs.signature.steps_per_epoch
        state, checkpoints = program.init(recipe.seed), None
        if run.keep is not None:
            period = run.keep_every and run.keep_every * steps
            opened = Checkpoints(folder, run.keep, period, inputs.signature.data)
            checkpoints = stack.enter_context(contextlib.closing(opened))
            state, position = resume(checkpoints, state)
            if position is not None:
                inputs.restore(position)
        first, total = int(state.step), recipe.epochs * steps
        if is_first and 0 < first < total and changed:
            print(
                f"{folder}: conditions differ ({changed}), so the result will differ in its last bits.", file=sys.stderr
            )
        config = dataclasses.asdict(recipe)
        log = stack.enter_context(Log(folder, first, run.log_steps > 0, run.wandb, config, is_first))
        what = f"from step {first} to {total}" if first < total else f"complete, {total} steps"
        console.print(f"{name}, {recipe.method}: {what}, in {folder}")
        state, stop = run_steps(Training(recipe, run, inputs, program, checkpoints, log, console), state)
    if stop:
        step = int(state.step)
        saved = f"saved step {step}. The same command goes on from there." if run.keep else "nothing is saved."
        console.print(f"{signal.Signals(stop).name}: {saved}")
        sys.exit(128 + stop)
    return folder
