"""Checkpoints of a training run: written in the background, whole or not at all, and read only if they are undamaged.

A checkpoint is a folder, ``checkpoints/STEP``, with the arrays, the position of the data, and copies of the run's own
files as they were at that step. It is sealed by checksums before it gets its name.
"""

import errno
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.system import checksums, files
from experiments.training.program import State
from experiments.training.run_folder import steps_of

CONFIG, LOGS = "config.json", ("metrics.csv", "steps.jsonl")
"""Files of a run of which each of its checkpoints has a copy."""

IDENTITY = "identity.json"
"""What a checkpoint is: its step, and the data that its run was trained on. It is sealed with the rest."""

_BESIDE_ARRAYS = 1 << 20  # bytes: blocks that are not full, metadata, checksums


class Checkpoints:
    """The checkpoints of the run in a folder, by step. The newest are kept, and every k-th one forever, k the period.

    ``data`` describes the data set; checkpoints of a run on other data are an error.
    """

    def __init__(self, run: Path, keep: int = 3, keep_period: int | None = None, data: Mapping[str, Any] | None = None):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: a run without a checkpoint cannot resume.")
        self.run, self.folder = run, (run / "checkpoints").resolve()
        self._keep, self._keep_period = keep, keep_period
        self._data = json.loads(json.dumps(data))
        self._arrays = ocp.StandardCheckpointer()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State, position: Any) -> None:
        """Starts to write; the state may be donated as soon as this returns. OSError is of this one, or the last."""
        self.wait()
        step = int(state.step)
        if step in self.steps:
            return
        partial = self.folder / f"{step}.partial"
        if jax.process_index() == 0:
            files.clear(self.path(step), is_folder=True)
            partial.mkdir(parents=True)  # before anything can fail: it tells that this one was never whole
            self._check_space(state)
        self._arrays.save(partial / "arrays", by_path(state))
        copies = {name: files.read(self.run / name) for name in (CONFIG, *LOGS) if (self.run / name).exists()}
        copies["position.json"] = json.dumps(position).encode()
        copies[IDENTITY] = json.dumps({"step": step, "data": self._data}).encode()
        self._pending = self._background.submit(self._complete, step, copies)

    def restore(self, like: State, step: int | None = None) -> tuple[State, Any]:
        """The state of a step, by default the last that is not damaged, and the position of the data.

        The arrays are put on the devices of ``like``. A damaged checkpoint, or file of the run, is a ValueError.
        """
        if step is None:
            step, damaged = self.newest_good()
            for other, what in damaged.items():
                print(f"Checkpoint {other} is damaged: {what}. {step} is read instead.", file=sys.stderr)
        if step not in self.steps:
            raise FileNotFoundError(f"No checkpoint of step {step} in {self.folder}; there are those of {self.steps}.")
        if fault := self._fault(step):
            raise ValueError(f"Checkpoint {step} in {self.folder} is damaged: {fault}.")
        check(self.run, step)
        self._check_data(step)
        shapes = {name: ocp.utils.to_shape_dtype_struct(leaf) for name, leaf in by_path(like).items()}
        arrays = self._arrays.restore(self.path(step) / "arrays", shapes)
        position = json.loads((self.path(step) / "position.json").read_text())
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in shapes]), position

    def newest_good(self, is_config_right: bool = False) -> tuple[int | None, dict[int, str]]:
        """The newest undamaged checkpoint, None if there are none, and what is wrong with those after it.

        If the run's config.json is known to be right, a checkpoint with another one belongs to another run, unless all
        have another one.
        """
        damaged: dict[int, str] = {}
        foreign = {step for step in self.steps if not _same(self.run / CONFIG, self.path(step) / CONFIG, _settings)}
        foreign = foreign if is_config_right and len(foreign) < len(self.steps) else set()
        for step in reversed(self.steps):
            fault = self._fault(step)
            if not fault and step in foreign:
                fault = "it belongs to a run with another config.json"
            if not fault:
                return step, damaged
            damaged[step] = fault
        if damaged:
            faults = "; ".join(f"{step}: {fault}" for step, fault in damaged.items())
            raise ValueError(
                f"All checkpoints in {self.folder} are damaged ({faults}). Nothing was changed. Put back a good copy, "
                "or start anew in another folder with --out."
            )
        return None, {}

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return steps_of(self.run)

    @property
    def last(self) -> int | None:
        """The newest complete checkpoint's step, with the one that is being written."""
        self.wait()
        return max(self.steps, default=None)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def wait(self) -> None:
        """Waits until all is on disk. Raises OSError if it cannot be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:  # the libraries below raise many kinds
                # A library's reason is the last of a chain.
                reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
                raise OSError(f"A checkpoint could not be written to {self.folder}: {reason}") from error

    def close(self) -> None:
        """Waits until all is on disk, and ends the background's threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._arrays.close()

    def _fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint: damage, or another checkpoint's name."""
        if fault := checksums.fault(self.path(step)):
            return fault
        own = self._identity(step).get("step", step)
        return None if own == step else f"it is a copy of checkpoint {own}"

    def _identity(self, step: int) -> dict[str, Any]:
        """Empty for checkpoints of earlier versions."""
        path = self.path(step) / IDENTITY
        return dict(json.loads(files.read(path))) if path.exists() else {}

    def _check_data(self, step: int) -> None:
        before = self._identity(step).get("data")
        if before is None or self._data is None:
            return
        for name, value in before.items():
            if self._data.get(name, value) != value:
                raise ValueError(
                    f"{self.run} was trained on data with {name} {value}, but the data read now has "
                    f"{self._data[name]}: name the folder of the same data set with --data-dir."
                )

    def _check_space(self, state: State) -> None:
        """Refuses a checkpoint that does not fit: half of one would only fill the disk."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _BESIDE_ARRAYS
        free = shutil.disk_usage(self.run).free
        if free < needed:
            message = f"No space left for a checkpoint, which takes {needed / 1e6:.1f} MB; {free / 1e6:.1f} MB are free"
            raise OSError(errno.ENOSPC, message, str(self.folder))

    def _complete(self, step: int, copies: dict[str, bytes]) -> None:
        self._arrays.wait_until_finished()
        if jax.process_index() > 0:
            return
        partial = self.folder / f"{step}.partial"
        for name, content in copies.items():
            (partial / name).write_bytes(content)
        checksums.seal(partial)
        partial.rename(self.path(step))
        for old in self.steps[: -self._keep]:
            if not self._keep_period or old % self._keep_period:
                self._remove(self.path(old))

    def _remove(self, path: Path) -> None:
        """Renames it first: a half-deleted folder must not look like a checkpoint."""
        partial = path.with_suffix(".partial")
        path.rename(partial)
        files.remove(partial)


def altered(run: Path, step: int | None = None) -> list[Path]:
    """Files of a run that are not what they were at a checkpoint, the last by default.

    Logs may have grown since, and the run may have been given more epochs.
    """
    step = max(steps_of(run), default=None) if step is None else step
    copies = run / "checkpoints" / str(step)
    found = [run / CONFIG] if not _same(run / CONFIG, copies / CONFIG, _settings) else []
    return found + [run / name for name in LOGS if not _same(run / name, copies / name, files.read)]


def _same(file: Path, copy: Path, read: Callable[[Path], Any]) -> bool:
    """Whether a file is what a copy says, if there is one; bytes may have been added to it."""
    if not copy.exists():
        return True
    found, expected = read(file) if file.is_file() else None, read(copy)
    return found.startswith(expected) if isinstance(found, bytes) else found == expected


def _settings(config: Path) -> dict[str, Any] | None:
    """All that does not change during a run; None for a damaged file."""
    try:
        return dict(json.loads(files.read(config)), epochs=None)
    except (TypeError, ValueError):
        return None


def check(run: Path, step: int | None = None) -> None:
    """Raises ValueError for the first file of a run that is not what it was at a checkpoint, the last by default."""
    for file in altered(run, step):
        raise ValueError(
            f"{file} is damaged, or was changed since the last checkpoint. The same training command mends it, or copy "
            f"{run / 'checkpoints' / str(step or steps_of(run)[-1]) / file.name} over it."
        )


def by_path(tree: Any) -> dict[str, jax.Array]:
    """Arrays by path: a format that does not depend on the classes of optimizers and networks."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
