"""Folders in which damage is noticed: SHA256SUMS holds a digest of every file, in the format of ``sha256sum -c``."""

import hashlib
import os
from pathlib import Path

from experiments.system import files

NAME = "SHA256SUMS"


def seal(folder: Path) -> None:
    """Writes the digests of all files in a folder; all of it is on the disk when this returns."""
    with (folder / NAME).open("w") as file:
        file.writelines(_lines(folder, is_synced=True))
        file.flush()
        os.fsync(file.fileno())


def fault(folder: Path) -> str | None:
    """What is wrong in a sealed folder, in words; None if it is as it was sealed."""
    try:
        sealed = files.read(folder / NAME).decode(errors="replace")
        found = _lines(folder)
    except FileNotFoundError:
        return f"{NAME} is missing"
    except ValueError as error:  # a thing of another kind
        return str(error)
    except OSError as error:
        return f"{error.filename or NAME} cannot be read: {error.strerror}"
    if sealed == "".join(found):
        return None
    names = {line.rstrip("\n").partition("  ")[2] for line in set(sealed.splitlines(keepends=True)) ^ set(found)}
    return _in_words(folder, sorted(names))


def _in_words(folder: Path, names: list[str]) -> str:
    name = names[0] if names and names[0] else NAME
    state = "not what was written" if (folder / name).exists() else "missing"
    others = f", nor are {len(names) - 1} more files" if len(names) > 1 else ""
    return f"{name} is {state}{others}"


def _lines(folder: Path, is_synced: bool = False) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not files.is_of_system(path))
    paths = sorted(path for path in found if path != folder / NAME)
    return [f"{_digest(path, is_synced)}  {path.relative_to(folder)}\n" for path in paths]


def _digest(path: Path, is_synced: bool) -> str:
    with path.open("rb") as file:
        if is_synced:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
