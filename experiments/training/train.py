"""Training a recipe: it can be stopped at any moment, and resumes where it stopped, whatever was damaged meanwhile."""

import contextlib
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.data.inputs import note_of, open_inputs
from experiments.settings import ranges
from experiments.settings.configs import Run
from experiments.settings.recipes import Recipe
from experiments.system import files
from experiments.training import devices, run_folder, supervisor
from experiments.training.checkpoints import CONFIG, LOGS, Checkpoints, altered
from experiments.training.logs import EpochRow, Log, read_epochs
from experiments.training.loop import Training, run_steps
from experiments.training.program import State, make_program
from experiments.training.run_folder import steps_of


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
            changed = run_folder.changed_conditions(folder, mesh)
            run_folder.note_conditions(folder, mesh)
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


def resume(checkpoints: Checkpoints, like: State) -> tuple[State, Any]:
    """The state to resume from: the newest undamaged checkpoint, or ``like`` if there are none.

    Damaged ones that are newer are set aside, and a line says so; the run's logs are replaced by the checkpoint's. With
    the state comes the position of the data, None at the start.

    Raises:
      ValueError: if there are checkpoints, but all are damaged. Nothing is changed then.
    """
    step, damaged = checkpoints.newest_good(is_config_right=True)
    step = _agreed(step)
    devices.wait_for_all("verified")  # all processes came to this step, before one changes the folder
    if jax.process_index() == 0:
        for partial in checkpoints.folder.glob("*.partial"):
            files.remove(partial)
        if step is not None:
            _go_back_to(step, damaged, checkpoints)
        else:
            _keep_logs(checkpoints.run)
    devices.wait_for_all("resumed")
    return (like, None) if step is None else checkpoints.restore(like, step)


def _agreed(step: int | None) -> int | None:
    """The step that the first process found; folders that are shared over a network may show others an older state."""
    chosen = devices.decided_by_first(-1 if step is None else step)
    return None if chosen < 0 else chosen


def _go_back_to(step: int, damaged: dict[int, str], checkpoints: Checkpoints) -> None:
    for other, fault in damaged.items():
        aside = _set_aside(checkpoints.path(other))
        print(
            f"Checkpoint {other} is damaged: {fault}. It is set aside as {aside.name}; going on from step {step}: "
            f"{other - step} steps are done again.",
            file=sys.stderr,
        )
    for file in altered(checkpoints.run, step):
        if file.name in LOGS:
            print(f"{file} is damaged: it becomes what it was at checkpoint {step}.", file=sys.stderr)
    for name in LOGS:
        copy = checkpoints.path(step) / name
        if copy.exists():
            files.replace(checkpoints.run / name, files.read(copy))


def _set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, to a name that is not taken for one."""
    return folder.rename(files.free_name(folder, ".damaged"))


def check_not_lost(folder: Path) -> None:
    """Raises FileExistsError if a folder holds the metrics of a complete run, but its checkpoints are gone.

    Where the first of them could not be written, as on a full disk, nothing is gone: such a run starts again.
    """
    is_cut_off = any((folder / "checkpoints").glob("*.partial"))
    if steps_of(folder) or is_cut_off or not (folder / CONFIG).exists():
        return
    rows, epochs = _rows(folder), files.read_json(folder / CONFIG).get("epochs")
    if rows and isinstance(epochs, int) and rows[-1].epoch >= epochs:
        raise FileExistsError(
            f"{folder} holds the metrics of a complete run of {epochs} epochs, but none of its checkpoints. Nothing "
            "was changed. Put the checkpoints back, or train again in another folder with --out."
        )


def clear_way(run: Path) -> None:
    """Renames what lies where a run's own files and folders belong and is of another kind."""
    for name in (CONFIG, *LOGS, "environment.jsonl"):
        files.clear(run / name)
    for name in ("checkpoints", "events"):
        files.clear(run / name, is_folder=True)


def _keep_logs(run: Path) -> None:
    """Keeps the logs of a run that starts again because it has no checkpoint."""
    if not (rows := _rows(run)):
        return
    kept = [file.rename(files.free_name(file, ".before")).name for name in LOGS if (file := run / name).exists()]
    print(
        f"{run} has metrics of {rows[-1].epoch} epochs but no checkpoint: it begins anew. The metrics are kept as "
        f"{' and '.join(kept)}.",
        file=sys.stderr,
    )


def _rows(run: Path) -> list[EpochRow]:
    """The epochs in a run's metrics; none if they are damaged."""
    try:
        return read_epochs(run / "metrics.csv")
    except ValueError:
        return []
