"""Resuming an interrupted run, whatever was damaged meanwhile."""

import sys
from pathlib import Path
from typing import Any

import jax

from experiments import devices, files, run_folder
from experiments.checkpoints import CONFIG, LOGS, Checkpoints, altered
from experiments.logs import EpochRow, read_epochs
from experiments.program import State
from experiments.run_folder import steps_of


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
            f"{other - step} steps are done again.", file=sys.stderr,
        )  # fmt: skip
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
    rows, epochs = _rows(folder), run_folder.read_json(folder / CONFIG).get("epochs")
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
        f"{' and '.join(kept)}.", file=sys.stderr,
    )  # fmt: skip


def _rows(run: Path) -> list[EpochRow]:
    """The epochs in a run's metrics; none if they are damaged."""
    try:
        return read_epochs(run / "metrics.csv")
    except ValueError:
        return []
