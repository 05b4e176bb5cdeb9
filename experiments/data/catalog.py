"""Which data a name stands for: what is built in, TFDS, a folder of images, an ``.npz`` file, a user's function."""

from pathlib import Path

from experiments.data import arrays, digits, folder, source, vision
from experiments.data.dataset import Dataset
from experiments.settings import python_files
from experiments.settings.sources import in_python_file, is_path


def load(name: str, data_dir: Path | None = None, image_size: int = 224) -> Dataset:
    """All of a data set that fits into memory.

    Args:
      name: ``digits``; a name of TFDS, with or without ``tfds:`` before it; a path; or ``FILE.py:FUNCTION``.
      data_dir: the folder that TFDS prepared data in. A path that is not there is looked for in it too.
      image_size: images of a folder or of TFDS that have several sizes, or are larger, become squares of this side.

    Raises:
      FileNotFoundError: if the data is not there, with what to do.
      ValueError: if there is no such data, or it is not as it should be.
    """
    if name == "digits":
        return digits.load()
    if in_python_file(name):
        return arrays.from_arrays(name, python_files.call(name))
    if is_path(name):
        path = _found(Path(name).expanduser(), data_dir)
        return arrays.read_npz(path) if path.suffix == ".npz" else folder.load(path, image_size)
    return vision.load(name.removeprefix("tfds:"), data_dir, image_size=image_size)


def _found(path: Path, data_dir: Path | None) -> Path:
    """The path, or what has its name in the folder of data sets, where a run's data may have moved."""
    if path.exists():
        return path
    elsewhere = None if data_dir is None else source.find_data_dir(data_dir) / path.name
    if elsewhere is not None and elsewhere.exists():
        return elsewhere
    raise FileNotFoundError(
        f"There is no {path}. If it was moved, name the folder that holds {path.name} with --data-dir."
    )
