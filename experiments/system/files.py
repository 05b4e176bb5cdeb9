"""Files of a run, read and written safely whatever else is in its folder.

Nothing waits on a named pipe, nothing is written through a symbolic link, and the files that operating systems leave in
folders do not count.
"""

import contextlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")


def is_of_system(path: Path) -> bool:
    """Whether an operating system left a file: a view of a folder, or an NFS file that is deleted but open."""
    return path.name in _OF_SYSTEMS or path.name.startswith((".nfs", "._"))


def read(path: Path) -> bytes:
    """The content of a file; a pipe, a device or a folder is a ValueError, where reading might never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {_kind(path)} where a file should be: move it away.")
    return path.read_bytes()


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".partial")
    with _new(unfinished) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


@contextlib.contextmanager
def opened(path: Path, mode: str = "ab") -> Iterator[IO[bytes]]:
    """Opens a file to append to or to lock; a symbolic link or a pipe in its place is an error."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileExistsError(f"{path} is {_kind(path)} where a file should be: move it away.")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_APPEND if "a" in mode else 0)
    with os.fdopen(os.open(path, flags, 0o666), mode) as file:
        yield file


def clear(path: Path, is_folder: bool = False) -> None:
    """Renames what is not of the kind that belongs here, a folder or a regular file, and says so on stderr."""
    found = path.is_symlink() or path.exists()
    if not found or (path.is_dir() if is_folder else path.is_file() and not path.is_symlink()):
        return
    aside = free_name(path, ".aside")
    kind = _kind(path)
    path.rename(aside)
    print(
        f"{path} was {kind} where a {'folder' if is_folder else 'file'} belongs. It is now {aside.name}.",
        file=sys.stderr,
    )


def remove(path: Path) -> None:
    """Deletes a folder or a file; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def free_name(path: Path, suffix: str) -> Path:
    """The path with a suffix, and a number if that name is taken."""
    aside, number = path.with_name(path.name + suffix), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = path.with_name(f"{path.name}{suffix}{number}")
    return aside


def _new(path: Path) -> IO[bytes]:
    """A new file; whatever had its name is replaced."""
    if path.is_symlink() or path.exists():
        remove(path)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a symbolic link"
    mode = path.stat().st_mode
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISREG: "a file"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device or a socket")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object; if it is damaged, a ValueError that names the copy of a checkpoint."""
    try:
        content = from_json(read(path))
        if isinstance(content, dict):
            return content
        error = f"it holds {type(content).__name__}"
    except ValueError as failure:
        error = str(failure)
    raise ValueError(f"{path} is damaged, or not JSON: {error}. {mended_by_copy(path)}".rstrip())


def from_json(text: str | bytes) -> Any:
    """The parsed JSON. A repeated key, or endless nesting, is a ValueError like any other mistake."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return content


def mended_by_copy(path: Path) -> str:
    """The action for a file of a run of which the last checkpoint has a copy."""
    copies = [copy for copy in path.parent.glob(f"checkpoints/*/{path.name}") if copy.parent.name.isdecimal()]
    return f"Copy {max(copies, key=lambda copy: int(copy.parent.name))} to {path}." if copies else ""
