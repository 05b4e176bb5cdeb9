"""Decoded images kept for the next run, under a name that changes with the files that they come from."""

import contextlib
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.system import home

Arrays = Mapping[str, np.ndarray]


def path(title: str, made_of: Any, cache_dir: str | Path | None = None) -> Path | None:
    """Where decoded data is kept; None if there is no place for a cache.

    Args:
      title: the file's name begins with it.
      made_of: all that the data depends on, such as names, sizes and times of files.
      cache_dir: the folder; ~/.cache/crsam_jax by default.
    """
    folder = home.cache_folder() if cache_dir is None else Path(cache_dir)
    fingerprint = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    return None if folder is None else folder / f"{title}-{fingerprint}.npz"


def kept(file: Path | None, decode: Callable[[], Arrays], names: Iterable[str]) -> Arrays:
    """The arrays of these names in a file of the cache; if it is missing or damaged they are decoded and kept there."""
    found = _read(file, names)
    if found is None:
        found = decode()
        _write(file, found)
    return found


def _read(file: Path | None, names: Iterable[str]) -> Arrays | None:
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in names}
    except (EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write(file: Path | None, arrays: Arrays) -> None:
    """Keeps decoded arrays; where that fails the next run decodes them again, and stderr says why."""
    if file is None:
        return
    partial = file.with_suffix(f".{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(file)  # whole or not at all, whoever else writes it
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        print(f"Decoded data is not kept in {file.parent}: {error.strerror or error}.", file=sys.stderr)
