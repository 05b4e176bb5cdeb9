"""The logs of a training run: epochs as CSV, steps as JSON lines, both as events for TensorBoard and W&B."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import optax

from experiments.system import files, tables


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
    """The learning rate of the epoch's last step."""
    images_per_second: float
    """Training images, without the evaluations in between."""
    waiting_percent: float
    """Share of that time in which the loop waited for its input."""
    seconds: float = 0.0
    """The time of the steps since the row before, without compilation and evaluation."""
    evaluations_per_step: float = 1.0
    """Gradient evaluations, the mean over all steps so far."""
    calibration_error: float | None = None
    """Expected difference of confidence and accuracy on the evaluation data, over 15 bins of confidence."""
    average_loss: float | None = None
    """The loss of the averaged weights on the evaluation data, as the next two are theirs; empty without an average."""
    average_accuracy: float | None = None
    average_calibration_error: float | None = None
    grad_norm: float | None = None
    """‖∇L‖ on the first training examples, in evaluation mode; empty where it is not measured, like those below."""
    curvature: float | None = None
    """vᵀHv along v = ∇L/‖∇L‖."""
    trace: float | None = None
    """The trace of the Hessian, after the last epoch."""
    normalized_trace: float | None = None
    """C(w), the trace over ‖∇L‖."""


class Log:
    """Opens the files of a run for writing after a step; rows of later steps, of a run cut off, are dropped.

    With ``has_steps`` steps and events are logged too; ``wandb`` is a project of Weights & Biases to write to as
    well, with ``config``. Only process 0 writes.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        has_steps: bool = True,
        wandb: str | None = None,
        config: Any = None,
        is_writer: bool = True,
    ):
        self._is_writer, self._has_steps = is_writer, has_steps and is_writer
        self._path, self._wandb = folder / "metrics.csv", None
        if not is_writer:
            return
        rows = [row for row in read_epochs(self._path) if row.step <= step] if step else []
        tables.write(self._path, rows) if rows else files.replace(self._path, "")
        if self._has_steps:
            from tensorboardX.event_file_writer import EventsWriter  # here: many runs write none, and it takes a while

            path = folder / "steps.jsonl"
            lines = [line for line in read_steps(path) if line["step"] <= step] if step else []
            files.replace(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._steps, self._events = path.open("a"), EventsWriter(str(folder / "events"))
            # What earlier files have of later steps does not count for TensorBoard.
            self._write_event(step + 1, session_log={"status": 1})  # a start
        if wandb is not None:
            self._wandb = _start_wandb(wandb, folder, config)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Logs a step."""
        if self._has_steps:
            self._steps.write(json.dumps({"step": step} | values) + "\n")
            self._steps.flush()
            self._add("step", values, step)

    def epoch(self, row: EpochRow) -> None:
        """Logs an epoch."""
        if self._is_writer:
            tables.append(self._path, [row])
            self._add("epoch", row._asdict(), row.step)

    def _add(self, group: str, values: dict[str, Any], step: int) -> None:
        known = {f"{group}/{name}": value for name, value in values.items() if name != "step" and value is not None}
        if self._has_steps:
            scalars = [{"tag": tag, "simple_value": value} for tag, value in known.items()]
            self._write_event(step, summary={"value": scalars})
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def _write_event(self, step: int, **what: Any) -> None:
        """Writes in the foreground, so that the caller gets an error of the disk."""
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if self._has_steps:
            with self._steps:  # closed whatever the events' file says
                self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))


def diagnostics(opt_state: Any) -> dict[str, float]:
    """The scalars that the method left in the optimizer's state; none of the base optimizer."""
    found = optax.tree.get_all_with_path(opt_state, "diagnostics")
    return {name: float(value) for _, values in found for name, value in values._asdict().items()}


def read_epochs(path: Path) -> list[EpochRow]:
    """The rows of a metrics.csv; none if there is no file."""
    return tables.read(path, EpochRow)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a steps.jsonl; none if there is no file."""
    if not path.exists():
        return []
    *lines, _ = files.read(path).decode().split("\n")  # what follows the last end of line was cut off
    try:
        steps = [files.from_json(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {str(error)[:200]}.") from error
    for step in steps:
        if not (isinstance(step, dict) and type(step.get("step")) is int):
            raise ValueError(f"{path} is damaged: a line is no step: {str(step)[:100]}.")
    return steps


def _start_wandb(project: str, folder: Path, config: Any) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb needs Weights & Biases: pip install wandb.") from error
    name = "-".join(folder.resolve().parts[-2:])  # the run's identity: a resumed run is one run there too
    return wandb.init(project=project, id=name, name=name, resume="allow", dir=str(folder), config=config)
