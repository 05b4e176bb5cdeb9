"""Going on with a run that was cut off, whatever was damaged meanwhile."""

import shutil
import sys
from pathlib import Path
from typing import Any

import jax

from experiments import scale
from experiments.checkpoints import LOGS, Checkpoints, altered
from experiments.program import State


def resume(checkpoints: Checkpoints, like: State) -> tuple[State, Any]:
    """The state to go on from: that of the newest checkpoint without damage, or ``like`` if there are none.

    Damaged ones that are newer are set aside, and a line says so; the run's logs become those of the checkpoint. With
    the state comes the position of the data, None at the start.

    Raises:
      ValueError: if there are checkpoints, but all are damaged. Nothing is changed then.
    """
    step, damaged = checkpoints.newest_good()
    scale.wait_for_all("verified")  # all processes came to this step, before one changes the folder
    if jax.process_index() == 0:
        for partial in checkpoints.folder.glob("*.partial"):
            shutil.rmtree(partial)
        if step is not None:
            _go_back_to(step, damaged, checkpoints)
    scale.wait_for_all("resumed")
    return (like, None) if step is None else checkpoints.restore(like, step)


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
        copy, partial = checkpoints.path(step) / name, checkpoints.run / f"{name}.partial"
        if copy.exists():
            shutil.copyfile(copy, partial)
            partial.replace(checkpoints.run / name)


def _set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, to a name that nobody takes for one."""
    aside, number = folder.with_suffix(".damaged"), 1
    while aside.exists():
        number += 1
        aside = folder.with_suffix(f".damaged{number}")
    return folder.rename(aside)
