"""What a training run writes down: epochs as CSV, steps as JSON lines, both as TensorBoard events."""

import csv
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import optax
from tensorboardX import SummaryWriter


class EpochRow(NamedTuple):
    """One row of metrics.csv. Losses are mean cross-entropies, accuracies are in percent."""

    epoch: int
    step: int
    train_loss: float
    """Mean over the epoch's batches, as trained on, at the weights before each step."""
    train_accuracy: float
    """Over the same batches and weights."""
    test_loss: float
    """Over the evaluation data, in evaluation mode."""
    test_accuracy: float
    learning_rate: float
    """Of the epoch's last step."""
    images_per_second: float
    """Training images, without the evaluations in between."""
    waiting_percent: float
    """Share of that time in which the loop waited for its input."""


class Log:
    """Opens the files of a run for writing after a step; rows of later steps, of a run cut off, are dropped.

    Args:
      folder: of the run.
      step: where training goes on.
      is_writer: ``False`` on all processes but one: nothing is written.
    """

    def __init__(self, folder: Path, step: int, is_writer: bool = True):
        self._is_writer = is_writer
        if not is_writer:
            return
        epochs, steps = folder / "metrics.csv", folder / "steps.jsonl"
        rows = [row for row in read_epochs(epochs) if row.step <= step]
        lines = [line for line in read_steps(steps) if line["step"] <= step]
        _replace(steps, "".join(json.dumps(line) + "\n" for line in lines))
        _replace(epochs, ",".join(EpochRow._fields) + "\n" + "".join(_csv_line(row) for row in rows))
        self._epochs, self._steps = epochs.open("a"), steps.open("a")
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Writes down what was seen at a step."""
        if self._is_writer:
            self._steps.write(json.dumps({"step": step} | values) + "\n")
            self._steps.flush()
            self._add("step", values, step)

    def epoch(self, row: EpochRow) -> None:
        """Writes down an epoch."""
        if self._is_writer:
            self._epochs.write(_csv_line(row))
            self._epochs.flush()
            self._add("epoch", row._asdict(), row.step)

    def _add(self, group: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if name not in ("epoch", "step"):
                self._events.add_scalar(f"{group}/{name}", value, step)
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_writer:
            for file in (self._epochs, self._steps, self._events):
                file.close()


def diagnostics(opt_state: Any) -> dict[str, float]:
    """The scalars that the method left in the optimizer's state; none of the base optimizer."""
    found = optax.tree.get_all_with_path(opt_state, "diagnostics")
    return {name: float(value) for _, values in found for name, value in values._asdict().items()}


def read_epochs(path: Path) -> list[EpochRow]:
    """The rows of a metrics.csv; none if there is no file."""
    if not path.exists():
        return []
    kinds = EpochRow.__annotations__
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be cut off
    return [EpochRow(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a steps.jsonl; none if there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # what follows the last end of line was cut off
    return [json.loads(line) for line in lines]


def _csv_line(row: EpochRow) -> str:
    return ",".join(repr(value) for value in row) + "\n"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
