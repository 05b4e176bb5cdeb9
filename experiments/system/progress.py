"""Progress for people: rates and a bar."""

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Collection, Iterator
from typing import Self, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Item = TypeVar("Item")


class Clock:
    """Counts steps, the time they take, and the time in it that the loop waited for input."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts again, now."""
        self._start, self._waiting, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """One more step, whose input comes inside."""
        begin = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - begin
        self._steps += 1

    @property
    def steps_per_second(self) -> float:
        """Since the start; 0 before the first step."""
        return self._steps / (time.perf_counter() - self._start)

    @property
    def waiting_percent(self) -> float:
        """The share of the time since the start that was spent waiting."""
        return 100 * self._waiting / (time.perf_counter() - self._start)


class Bar:
    """A progress bar with a count and the time that is left, whole on every terminal, and as much text as fits.

    Without a terminal there is no bar: lines that are printed say how much time is left, and one comes each minute.
    """

    def __init__(self, console: Console, total: int, completed: int = 0, unit: str = "steps", text: str = "compiling"):
        whole, bar = Column(no_wrap=True), BarColumn(40 if console.width >= 120 else 10)
        count, left = MofNCompleteColumn(table_column=whole), TimeRemainingColumn(table_column=whole)
        columns = _Parts(), bar, count, TextColumn(unit), TextColumn("ETA"), left  # a text is whole of its own
        is_left = not console.quiet and completed < total
        is_shown = console.is_terminal and is_left
        self._lines = _Lines(total, completed, unit) if is_left and not is_shown else None
        self._progress = Progress(*columns, console=console, disable=not is_shown)
        self._task = self._progress.add_task("", total=total, completed=completed, parts=(text,))

    def update(self, completed: int, *parts: str) -> None:
        """Moves to a count; the parts of the text that do not fit are left out, from the last on."""
        self._progress.update(self._task, completed=completed, parts=parts)
        if self._lines is not None and self._lines.update(completed):
            self.print("  ".join((*parts, self._lines.count())), is_progress=True)

    def advance(self, *parts: str) -> None:
        """Moves on by one."""
        self._progress.update(self._task, advance=1, parts=parts)
        if self._lines is not None:
            self._lines.update(self._lines.completed + 1)

    def print(self, text: str, is_progress: bool = False) -> None:
        """Leaves a line above the bar; without a terminal, one of progress says how much time is left."""
        if self._lines is not None and is_progress:
            text += self._lines.time_left()
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def track(items: Collection[Item], text: str, unit: str) -> Iterator[Item]:
    """Iterates with a bar on stderr, so that what a command prints can be kept alone."""
    with Bar(Console(stderr=True), len(items), unit=unit, text=text) as bar:
        for item in items:
            yield item
            bar.advance(text)


class _Lines:
    """How far the work is, for lines of a log file."""

    def __init__(self, total: int, completed: int, unit: str):
        self._total, self._unit, self.completed = total, unit, completed
        self._told = self._start = time.monotonic()
        self._first = None if unit == "steps" else completed  # the first step compiles, which no other does

    def update(self, completed: int) -> bool:
        """Moves to a count: whether nothing was said for a minute."""
        now, self.completed = time.monotonic(), completed
        if self._first is None:
            self._first, self._start = completed, now
        return now - self._told >= 60

    def count(self) -> str:
        return f"{self.completed}/{self._total} {self._unit}"

    def time_left(self) -> str:
        """As the end of a line that is printed now; empty at the end, and before it can be known."""
        self._told = now = time.monotonic()
        done = self.completed - (self._first or 0)
        if not done or self.completed >= self._total:
            return ""
        left = (now - self._start) * (self._total - self.completed) / done
        return f"; {datetime.timedelta(seconds=round(left))} left"


class _Parts(ProgressColumn):
    """The text of a bar, as much of it as fits; of all its columns the only one that gives way."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> "_Fitting":
        return _Fitting(task.fields["parts"])


@dataclasses.dataclass(frozen=True)
class _Fitting:
    """As many parts of a text as fit into one line."""

    parts: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = ["  ".join(self.parts[:count]) for count in range(len(self.parts), 0, -1)]
        fitting = next((line for line in lines if len(line) <= options.max_width), lines[-1])
        yield Text(fitting, no_wrap=True, overflow="ellipsis")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(1, len("  ".join(self.parts))))
