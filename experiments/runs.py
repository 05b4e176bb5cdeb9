"""A folder a run: the resolved configuration, and rows that are on disk as soon as they exist."""

import csv
import dataclasses
import datetime
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


def new_folder(name: str, out: Path | None) -> Path:
    """Makes ``out``, or results/NAME-DATE-TIME if it is None.

    Raises:
      FileExistsError: if it holds something already, so that no earlier result is overwritten.
    """
    folder = out or Path("results") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds the results of another run; name another folder with --out.")
    return folder


def save_config(config: Any, folder: Path) -> None:
    """Writes the resolved configuration, a dataclass, as config.json."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


class CsvWriter:
    """Appends NamedTuples to a CSV file, one line each, flushed at once: an interrupted run loses nothing."""

    def __init__(self, path: Path, row_type: type[NamedTuple]):
        self._file = path.open("x", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(row_type._fields)

    def write(self, row: tuple[Any, ...]) -> None:
        self._writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
