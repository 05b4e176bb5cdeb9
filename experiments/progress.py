"""What a person sees of a training run: rates and a bar."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.logs import EpochRow


class Clock:
    """Counts steps, the time they take, and the time in it that the loop waited for input."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins anew, now."""
        self._start = time.perf_counter()
        self._waiting = 0.0
        self._steps = 0

    def count(self, waiting: float) -> None:
        """One more step, whose input took so many seconds."""
        self._steps += 1
        self._waiting += waiting

    @property
    def steps_per_second(self) -> float:
        """Since the start; 0 before the first step."""
        return self._steps / (time.perf_counter() - self._start)

    @property
    def waiting_percent(self) -> float:
        """Of the time since the start."""
        return 100 * self._waiting / (time.perf_counter() - self._start)


class Bar:
    """A progress bar over all steps with loss, accuracy, images per second and the time that is left."""

    def __init__(self, console: Console, total: int, first: int):
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, disable=console.quiet)
        self._task = self._progress.add_task("compiling", total=total, completed=first)

    def update(self, step: int, text: str) -> None:
        """Moves to a step."""
        self._progress.update(self._task, completed=step, description=text)

    def print(self, row: EpochRow) -> None:
        """Leaves a line for an epoch above the bar."""
        self._progress.console.print(
            f"epoch {row.epoch}: training loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.2f} %; "
            f"test loss {row.test_loss:.4f}, accuracy {row.test_accuracy:.2f} %; {row.images_per_second:.0f} images/s, "
            f"{row.waiting_percent:.1f} % of it waiting for data",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
