"""What a command finds around it: caches, homes, terminals and pipes that fail, and data that is not what it says."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import cli
from experiments.data import dataset, source, vision
from experiments.data.dataset import Split
from experiments.system import home, terminal
from tests.experiments.prepared import examples, prepare

ROOT = Path(__file__).parents[2]


def prepared(folder, shape=(28, 28, 1), labels=lambda labels: labels):
    splits = {}
    for seed, (name, count) in enumerate((("train", 20), ("test", 10))):
        images, numbers = examples(count, shape, 10, seed)
        splits[name] = images, numbers
    prepare(folder, "fashion_mnist", "3.0.1", (28, 28, 1), splits, 10)
    return folder


def test_a_cache_that_cannot_be_written_costs_a_word(tmp_path, capsys, monkeypatch):
    folder = prepared(tmp_path / "data")
    (tmp_path / "file").write_text("in the way")
    loaded = vision.load("fashion_mnist", folder, tmp_path / "file" / "cache")
    assert len(loaded.train.labels) == 20
    assert "Decoded data is not kept in" in capsys.readouterr().err

    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    vision.load("fashion_mnist", folder, tmp_path / "cache")
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_home_there_is_no_cache(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert home.cache_folder() is None
    cli._keep_compiled_programs()
    assert len(vision.load("fashion_mnist", prepared(tmp_path)).test.labels) == 10
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        source.find_data_dir()


LABELS = np.arange(20) % 10


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            Split(np.zeros((20, 4, 4, 1), np.uint8), LABELS + 1),
            r"few, test: labels must be in 0, .* in 1, ..., 10",
        ),
        (Split(np.zeros((20, 4, 4, 1), np.uint8), LABELS - 1), r"labels must be in 0, ..., 9 .* in -1, ..., 8"),
        (Split(np.zeros((20, 4, 5, 1), np.uint8), LABELS), r"images must have shape \[4, 4, 1\], got \[4, 5, 1\]"),
        (Split(np.zeros((20, 4, 4), np.uint8), LABELS), r"must have shape \[4, 4, 1\], got \[4, 4\]"),
        (Split(np.zeros((19, 4, 4, 1), np.uint8), LABELS), "19 images and 20 labels"),
    ],
)
def test_labels_and_shapes_are_checked_by_name(split, message):
    good = Split(np.zeros((20, 4, 4, 1), np.uint8), LABELS)
    dataset.check("few", (good, good), 10, (4, 4, 1))
    with pytest.raises(ValueError, match=message):
        dataset.check("few", (good, split), 10, (4, 4, 1))


def test_a_cached_copy_with_wrong_labels_is_refused(tmp_path):
    folder = prepared(tmp_path / "data")
    vision.load("fashion_mnist", folder, tmp_path / "cache")
    [cache] = (tmp_path / "cache").iterdir()
    with np.load(cache) as arrays:
        changed = dict(arrays) | {"train_labels": arrays["train_labels"] + 10}
    np.savez(cache, **changed)
    with pytest.raises(ValueError, match="fashion_mnist, train: labels must be in 0"):
        vision.load("fashion_mnist", folder, tmp_path / "cache")


def test_symbols_in_ascii_and_lost_readers():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    kept, sys.stdout = sys.stdout, raw
    kept_err, sys.stderr = sys.stderr, io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    try:
        terminal.prepare()
        print("ρ = 0.1 ± 0.2, é")
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = kept, kept_err
    assert raw.buffer.getvalue() == b"rho = 0.1 +- 0.2, ?\n"

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    stream = terminal.Lasting(Gone())
    assert stream.write("lost") == 4
    stream.flush()

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        terminal.Lasting(Full()).write("text")


def run_list(shell, **environment):
    command = f"{sys.executable} -m experiments list {shell}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, shell=True, cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("shell", [">&-", "2>&-", "| head -1", "| true"])
def test_closed_streams_are_no_traceback(shell):
    assert "Traceback" not in (done := run_list(shell)).stderr
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_a_terminal_in_ascii():
    done = run_list("", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert "rho SAM" in done.stdout
