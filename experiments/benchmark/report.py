"""Rows of measurements as a Markdown table and as CSV."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write(rows: Sequence[Any], table: Callable[[Sequence[Any]], str], out: Path | None) -> None:
    """Prints NamedTuples as ``table`` draws them, and writes them to ``out`` as CSV."""
    print(table(rows))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(rows[0]._fields)
            writer.writerows(rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
      >>> print(markdown(["method", "points"], [["SAM", "2"]]))
      | method | points |
      |---|---|
      | SAM | 2 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])
