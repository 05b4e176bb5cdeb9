"""Numbers as CSV: typed rows, each on disk as soon as it exists."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Row = TypeVar("Row")


def read(path: Path, row_type: Callable[..., Row]) -> list[Row]:
    """The rows of a file, as a NamedTuple; none if there is no file. A last line that was cut off does not count."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    kinds: dict[str, Callable[[str], Any]] = row_type.__annotations__
    return [row_type(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(lines)]


def append(path: Path, rows: Iterable[Any]) -> None:
    """Adds NamedTuples to a file, in the place of a last line that was cut off; a new file begins with a header."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    with path.open("w" if whole != text else "a") as file:
        if whole != text:
            file.write(whole)
        for row in rows:
            if not whole:
                whole = ",".join(row._fields) + "\n"
                file.write(whole)
            file.write(",".join(f"{value:.7g}" if isinstance(value, float) else str(value) for value in row) + "\n")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over runs: the mean and the sample standard deviation, which is NaN for a single one."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")
