"""Prepared TFDS data sets as random-access sources, without TensorFlow."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from experiments.settings.sources import there_is_a_path
from experiments.system import home
from experiments.system.interruptions import held_back

T = TypeVar("T")

# What has to be downloaded by hand before TFDS can prepare it.
_BY_HAND = {
    "imagenet2012": "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org, login required)",
}


def find_data_dir(data_dir: str | Path | None = None) -> Path:
    """The folder of prepared data sets: the argument, else $TFDS_DATA_DIR, ~/tensorflow_datasets."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if "TFDS_DATA_DIR" in os.environ:
        return Path(os.environ["TFDS_DATA_DIR"]).expanduser()
    if (own := home.folder()) is None:
        raise FileNotFoundError("There is no home folder to look for data in: set TFDS_DATA_DIR, or use --data-dir.")
    return own / "tensorflow_datasets"


def find_builder(name: str, data_dir: str | Path | None = None) -> Any:
    """The TFDS builder of a data set that has been prepared, such as "imagenet2012_corrupted/fog_3"; never downloads.

    Raises:
      FileNotFoundError: saying what to run, or where to put the data, if it is not there.
      ValueError: if it is there in a format without random access, or damaged.
    """
    import tensorflow_datasets as tfds

    folder = find_data_dir(data_dir)
    with undamaged(name, data_dir):
        try:
            builder = tfds.builder(name, data_dir=folder)
        except ValueError as error:
            is_unknown = isinstance(error, tfds.core.registered.DatasetNotFoundError)
            if is_unknown or str(error).startswith("Parsing builder name"):
                raise _unknown(name, tfds.list_builders(with_community_datasets=False)) from error
            raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error
    command = _command(name, folder)
    if not builder.is_prepared():
        by_hand = _BY_HAND.get(name.partition("/")[0])
        raise FileNotFoundError(
            f"{name} is not in {folder}. If it is prepared elsewhere, set TFDS_DATA_DIR or the data directory to the "
            "folder that holds it. To prepare it, on a machine with a network: pip install tensorflow, then\n"
            f"  {command}" + (f"\nwith {by_hand} in {folder / 'downloads' / 'manual'}." if by_hand else "")
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise ValueError(
            f"{name} in {folder} is stored as {file_format}, which cannot be read at random. Prepare it again:\n"
            f"  {command}"
        )
    return builder


@contextlib.contextmanager
def undamaged(name: str, data_dir: str | Path | None = None) -> Iterator[None]:
    """Around what reads a data set: makes one ValueError of what the libraries raise where a file is damaged."""
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError, ValueError):
        raise
    except Exception as error:
        folder = find_data_dir(data_dir)
        reason = str(error).splitlines()[-1] if str(error) else repr(error)
        raise ValueError(
            f"{name} in {folder} is damaged or cut off: {reason} Delete {folder / name} and prepare it again: "
            f"{_command(name, folder)}"
        ) from error


def examples(source: Any) -> Iterator[dict[str, Any]]:
    """All examples of a source, in order, a thousand at once: far quicker than one by one."""
    for start in range(0, len(source), 1000):
        yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))


def read(batches: Iterable[T], name: str, data_dir: str | Path | None = None) -> Iterator[T]:
    """The batches, with the errors of :func:`undamaged`; worker processes that make them do not hear Ctrl-C."""
    with undamaged(name, data_dir):
        with held_back():
            iterator = iter(batches)
        while True:
            with held_back():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


def _unknown(name: str, known: list[str]) -> ValueError:
    """The error for a name that TFDS does not know, with close ones; all of them would fill a screen."""
    close = difflib.get_close_matches(name, ["digits", *known])
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "it is neither digits nor a name of TFDS."
    return ValueError(f"There is no data set {name!r}: {hint}{there_is_a_path(name)}")


def _command(name: str, folder: Path) -> str:
    return f"tfds build {name} --data_dir={folder} --file_format=array_record"
