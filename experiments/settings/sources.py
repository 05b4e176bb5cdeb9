"""What the name of a data set, a network or a recipe stands for: one of ours, a path, or an object in a Python file."""

import os
from pathlib import Path

_FOREIGN_SUFFIXES = (".npz", "/")


def in_python_file(name: str) -> tuple[Path, str] | None:
    """The file and the object of ``FILE.py:OBJECT``; None for another name.

    Example:
      >>> in_python_file("mine.py:photos")
      (PosixPath('mine.py'), 'photos')
    """
    file, colon, attribute = name.rpartition(":")
    return (Path(file).expanduser(), attribute) if colon and file.endswith(".py") else None


def is_path(name: str) -> bool:
    """Whether a name is the path of an ``.npz`` file or a folder: ``./photos``, not the bare ``photos``.

    Example:
      >>> [is_path(name) for name in ("./photos", "photos/", "a.npz", "mnist", "imagenet2012_corrupted/fog_3")]
      [True, True, True, False, False]
    """
    begins_as_path = name in (".", "..") or name.startswith(("/", "./", "../", "~/"))
    return begins_as_path or name.endswith(_FOREIGN_SUFFIXES) or ("/" in name and Path(name).is_dir())


def is_own(name: str) -> bool:
    """Whether a name stands for data of the user: a path, an object in a Python file, or ``tfds:NAME``."""
    return in_python_file(name) is not None or is_path(name) or name.startswith("tfds:")


def absolute(name: str) -> str:
    """The name, with an absolute path if it has one, so that it holds in every working directory."""
    if found := in_python_file(name):
        return f"{os.path.abspath(found[0])}:{found[1]}"
    return os.path.abspath(Path(name).expanduser()) if is_path(name) else name


def title(name: str) -> str:
    """What a recipe, or a file with one, or data, is called in folders.

    Example:
      >>> [title(name) for name in ("digits", "a/b.json", "./photos/", "x.npz", "mine.py:small", "tfds:mnist")]
      ['digits', 'b', 'photos', 'x', 'small', 'mnist']
    """
    if found := in_python_file(name):
        return found[1]
    if name.endswith(".json") or is_path(name):
        path = Path(absolute(name)) if is_path(name) else Path(name)
        return path.name if path.is_dir() else path.stem
    return name.removeprefix("tfds:").replace("/", "-")


def there_is_a_path(name: str) -> str:
    """A hint for a bare name under which there is a folder or a file; or empty."""
    return f" There is a path of that name: write ./{name}" if name and Path(name).exists() else ""
