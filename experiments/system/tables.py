"""Tables as CSV files of typed rows, each on disk as soon as it exists, as Markdown, and on a terminal."""

import csv
import io
import itertools
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.system import files

Row = TypeVar("Row")


def read(path: Path, row_type: Callable[..., Row]) -> list[Row]:
    """The rows of a file, as a NamedTuple; none if there is no file. A last line that was cut off does not count."""
    if not path.exists():
        return []
    text = files.read(path).decode(errors="replace")
    kinds = typing.get_type_hints(row_type)
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    try:
        return [row_type(**{name: _parsed(value, kinds[name]) for name, value in row.items()}) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {str(error)[:200] or type(error).__name__}.") from error


def append(path: Path, rows: Sequence[Any]) -> None:
    """Adds NamedTuples to a file, in the place of a last line that was cut off; a new file begins with a header."""
    text = files.read(path).decode() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.replace(path, whole)
    added = io.StringIO()
    writer = csv.writer(added, lineterminator="\n")
    if rows and not whole:
        writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    with files.opened(path) as file:
        file.write(added.getvalue().encode())


def write(path: Path, rows: Sequence[Any]) -> None:
    """Writes NamedTuples, or dictionaries whose keys may differ, whole or not at all."""
    dicts, text = [row if isinstance(row, dict) else row._asdict() for row in rows], io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in dicts for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(dicts)
    files.replace(path, text.getvalue())


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Example:
      >>> print(markdown(["method", "evals"], [["SAM", "2"]]), end="")
      | method | evals |
      |---|---|
      | SAM | 2 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]]) + "\n"


def show(text: str, keys: int = 1) -> None:
    """Prints Markdown; on a terminal its tables are aligned, and divided where too wide, see :func:`fitted`."""
    if not sys.stdout.isatty():
        print(text, end="" if text.endswith("\n") else "\n")
        return
    width = shutil.get_terminal_size().columns
    for is_table, group in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        lines = list(group)
        print(*(fitted(lines, width, keys) if is_table else [textwrap.fill(line, width) for line in lines]), sep="\n")


def fitted(lines: Sequence[str], width: int, keys: int = 1) -> list[str]:
    r"""A table in Markdown as aligned lines of at most a width, in parts that begin with its first columns, the keys.

    Example:
      >>> table = markdown(["method", "evals", "time"], [["SAM", "2", "1.9"], ["CR-SAM", "3", "2.7"]])
      >>> print(*fitted(table.splitlines(), width=14), sep="\n")
      method  evals
      SAM         2
      CR-SAM      3
      <BLANKLINE>
      method  time
      SAM      1.9
      CR-SAM   2.7
    """
    rows = [line[2:-2].split(" | ") for line in lines if not line.startswith("|---")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = [list(range(keys))]  # the columns of each
    for column in range(keys, len(widths)):
        if len(parts[-1]) > keys and sum(widths[i] + 2 for i in parts[-1]) + widths[column] > width:
            parts.append(list(range(keys)))
        parts[-1].append(column)
    aligned = [[f"{cell:{'<' if i < keys else '>'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    blocks = ["\n".join("  ".join(row[i] for i in part).rstrip() for row in aligned) for part in parts]
    return "\n\n".join(blocks).splitlines()


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over runs: the mean and the sample standard deviation, which is NaN for a single one."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


def _parsed(text: str, kind: Any) -> Any:
    """A cell as its column's type; an empty one is None, where the column allows it."""
    options = typing.get_args(kind) or (kind,)
    return None if text == "" and types.NoneType in options else options[0](text)
