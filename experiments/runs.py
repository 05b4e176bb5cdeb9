"""A folder a run: the resolved configuration, and rows that are on disk as soon as they exist."""

import contextlib
import csv
import dataclasses
import datetime
import fcntl
import json
from collections.abc import Iterator
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
    """Writes the resolved configuration, a dataclass, as config.json, whole or not at all."""
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    partial.replace(folder / "config.json")


def check_free(config: Any, folder: Path) -> None:
    """Checks that a folder is empty, or holds the run of this very configuration, which can go on.

    Raises:
      FileExistsError: if it holds anything else, with the settings that differ.
    """
    path = folder / "config.json"
    if path.exists():
        saved, wanted = json.loads(path.read_text()), json.loads(json.dumps(dataclasses.asdict(config)))
        names = saved.keys() | wanted.keys()
        changes = [f"{k} {saved.get(k)} there, {wanted.get(k)} here" for k in names if saved.get(k) != wanted.get(k)]
        if changes:
            raise FileExistsError(
                f"{folder} holds another run ({'; '.join(sorted(changes))}). Name another folder with --out."
            )
    elif folder.exists() and {entry.name for entry in folder.iterdir()} - {"lock", "config.json.partial"}:
        raise FileExistsError(f"{folder} holds something that is not a run; name another folder with --out.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the same run; the system frees the lock however the process ends.

    Raises:
      FileExistsError: if another process holds it.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"Another process is writing to {folder}.") from error
        yield


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
