"""What the world does to a command: full disks, files in the way, damaged data, Ctrl-C. One line, no traceback."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import cli
from experiments.data import vision
from experiments.data.inputs import open_inputs
from experiments.settings.configs import Run
from experiments.training import devices
from tests.experiments.prepared import examples, prepare
from tests.experiments.test_imagenet_training import RECIPE

ROOT = Path(__file__).parents[2]
ONE = ("--epochs", "1", "--model-options.width", "4", "--devices", "1")
LONG = ("--epochs", "2000", *ONE[2:])

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process: what it says on stderr."""
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)

    def run(*arguments, status=1):
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        assert cli.main() == status
        return capsys.readouterr().err

    return run


def start(arguments, cache_folder, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


# Files


def test_a_file_in_the_place_of_the_folder_is_one_line(command, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert (
        command("train", "digits-convnet", *ONE, "--out", file)
        == f"error: {file} is a file: name a folder with --out.\n"
    )
    assert (
        command("train", "digits-convnet", *ONE, "--out", file / "run") == f"error: Not a directory: {file / 'run'}\n"
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged, or not JSON"),
        ("[]", "it holds list"),
        ("\x00", "is damaged, or not JSON"),
        ('{"method": "sam"}', "This is no recipe: batch_size"),
    ],
)
def test_a_broken_configuration_is_one_line_with_its_path(command, tmp_path, content, said):
    config = tmp_path / "config.json"
    config.write_text(content)
    for arguments in (("train", config, "--out", tmp_path / "new"), ("evaluate", tmp_path), ("export", tmp_path)):
        [line] = command(*arguments).splitlines()
        assert str(config) in line
        assert said in line
    assert config.read_text() == content
    assert not (tmp_path / "new").exists()


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(command, tmp_path):
    pytest.importorskip("safetensors")
    command("train", "digits-convnet", *ONE, "--out", tmp_path / "run", status=0)
    (tmp_path / "taken").mkdir()
    for out in (tmp_path / "taken", tmp_path / "nowhere" / "params.safetensors"):
        [line] = command("export", tmp_path / "run", "--out", out).splitlines()
        assert line.startswith("error: ")
        assert out.name in line
    assert not list((tmp_path / "taken").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("largest", [1_500, 6_000])
def test_a_disk_that_takes_no_more_is_one_line_and_the_run_goes_on_later(largest, tmp_path, cache_folder):
    """Files cannot grow beyond a size, as on a full disk: the only checkpoint of a complete run is not written."""
    arguments = ("train", "digits-convnet", *ONE, "--log-steps", "1", "--out", tmp_path / "run")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    process = start(arguments, cache_folder, preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 1
    [line] = error.splitlines()
    assert "File too large" in line
    assert str(tmp_path / "run") in line
    process = start(arguments, cache_folder)
    output, error = process.communicate()
    assert process.returncode == 0
    assert "from step 0" in output
    [line] = error.splitlines()
    assert "metrics of 1 epochs but no checkpoint: it begins anew" in line


# Data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Small stand-ins, and their files' contents to put back."""
    folder = tmp_path_factory.mktemp("tfds")
    images = lambda seed: examples(60, (28, 28, 1), 10, seed)
    prepare(folder, "fashion_mnist", "3.0.1", (28, 28, 1), {"train": images(0), "test": images(1)}, 10)
    photographs = {split: examples(60, (40, 40, 3), 10, seed) for seed, split in enumerate(("train", "validation"))}
    prepare(folder, "imagenet2012", "5.1.0", (None, None, 3), photographs, 1000)
    return folder


@pytest.fixture
def damaged(data_dir):
    """Damages a file of a data set, for the time of a test."""
    kept = {}

    def damage(pattern, how):
        [path] = data_dir.glob(pattern)
        content = kept.setdefault(path, path.read_bytes())
        path.write_bytes({"cut off": content[: len(content) // 2], "emptied": b"", "zeros": bytes(len(content))}[how])

    yield damage
    for path, content in kept.items():
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut off", "emptied", "zeros"])
@pytest.mark.parametrize("file", ["*-train.*", "dataset_info.json"])
def test_a_damaged_data_set_is_an_error_that_names_it(file, how, data_dir, damaged, tmp_path):
    damaged(f"fashion_mnist/*/{file}", how)
    with pytest.raises(ValueError, match=rf"fashion_mnist in {data_dir} is damaged.*tfds build fashion_mnist"):
        vision.load("fashion_mnist", data_dir, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["cut off", "emptied", "flipped"])
def test_a_damaged_copy_of_decoded_data_is_made_anew(how, data_dir, tmp_path):
    whole = vision.load("fashion_mnist", data_dir, tmp_path)
    [cache] = tmp_path.iterdir()
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes({"cut off": content[: len(content) // 2], "emptied": b"", "flipped": content}[how])
    again = vision.load("fashion_mnist", data_dir, tmp_path)
    np.testing.assert_array_equal(again.train.images, whole.train.images)
    np.testing.assert_array_equal(again.test.labels, whole.test.labels)


@pytest.mark.parametrize("how", ["cut off", "emptied", "zeros"])
def test_streamed_data_that_is_damaged_is_an_error_that_names_it(how, data_dir, damaged):
    run = Run(data_dir=data_dir, devices=1, workers=0)
    damaged("imagenet2012/*/*-train.*", how)

    def epoch():
        inputs = open_inputs(RECIPE, devices.start(run), run)
        for step in range(4):
            inputs.feed(step)

    with pytest.raises(ValueError, match=rf"imagenet2012 in {data_dir} is damaged.*tfds build imagenet2012"):
        epoch()


# Ctrl-C


def interrupted(arguments, seconds, cache_folder):
    """Sends Ctrl-C, which reaches all processes of a terminal, so many seconds after the command's first words.

    Returns all that the command says. Before its first words Python itself starts, and a traceback of Python's would
    answer.
    """
    process = start(arguments, cache_folder, start_new_session=True)
    try:
        first = os.read(process.stdout.fileno(), 1000).decode()  # `communicate` then reads what follows
        assert first.startswith("loading ...")
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds)
        os.killpg(process.pid, signal.SIGINT)
        output, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGINT
    output = first + output
    assert "Traceback" not in output + error
    return output, error


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 1, 2, 3, 4, 5, 7, 9])
def test_ctrl_c_while_a_run_starts_is_one_line(seconds, tmp_path, cache_folder):
    output, error = interrupted(("train", "digits-convnet", *LONG, "--out", tmp_path / "run"), seconds, cache_folder)
    assert error == "error: interrupted\n" or (not error and "The same command goes on from there." in output)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 5, 8, 12, 20])
def test_ctrl_c_while_several_processes_start_is_one_line_and_no_run_is_begun_after_it(seconds, tmp_path, cache_folder):
    options = ("--methods", "base", "sam", "--seeds", "2", "--processes", "2", "--out", tmp_path)
    _, error = interrupted(("compare", "digits-convnet", *LONG, *options), seconds, cache_folder)
    assert error == "error: interrupted\n"
    assert len(list(tmp_path.glob("*/config.json"))) <= 2
    for config in tmp_path.glob("*/config.json"):
        assert json.loads(config.read_text())["epochs"] == 2000
        assert len(list((config.parent / "checkpoints").iterdir())) == 1  # saved, at its first step or later


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [8, 16])
def test_ctrl_c_with_worker_processes_saves_the_run(seconds, data_dir, tmp_path, cache_folder):
    """They are reached as well, and must neither stop nor speak before the run is saved."""
    changes = ("model_options.width=8", "model_options.stage_sizes=[1,1]", "image_size=32", "batch_size=20")
    arguments = (
        "train", "imagenet-resnet50", "--model", "resnet18", "--set", *changes, "--epochs", "5000", "--devices", "1",
        "--workers", "2", "--data-dir", data_dir, "--out", tmp_path,
    )  # fmt: skip
    output, error = interrupted(arguments, seconds, cache_folder)
    assert error == "error: interrupted\n" or (not error and "The same command goes on from there." in output)


# Processes


def several(tmp_path, cache_folder):
    """Two processes that train; ends once both of them do."""
    options = ("--methods", "base", "sam", "--seeds", "1", "--processes", "2", "--out", tmp_path)
    process = start(("compare", "digits-convnet", *LONG, *options), cache_folder, start_new_session=True)
    deadline = time.monotonic() + 240
    try:
        while len(list(tmp_path.glob("*/metrics.csv"))) < 2 or any(
            len(path.read_text().splitlines()) < 3 for path in tmp_path.glob("*/metrics.csv")
        ):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    return process, children


def wait_until_gone(pids):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [False, True])
def test_sigterm_to_one_process_or_to_all_saves_every_run_and_leaves_none_behind(everybody, tmp_path, cache_folder):
    process, children = several(tmp_path, cache_folder)
    if everybody:  # as a batch system does
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    output, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert not error
    assert output.endswith("Terminated: what was training is saved. The same command goes on from there.\n")
    wait_until_gone(children)
    assert [len(list(path.iterdir())) for path in tmp_path.glob("*/checkpoints")] == [1, 1]


@pytest.mark.slow
def test_processes_whose_parent_is_killed_end(tmp_path, cache_folder):
    process, children = several(tmp_path, cache_folder)
    process.kill()
    process.communicate()
    wait_until_gone(children)


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(tmp_path, cache_folder):
    process, children = several(tmp_path, cache_folder)
    os.kill(children[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    [line] = error.splitlines()
    assert line.startswith("error: a process that trained was killed, perhaps for want of memory.")
    assert all(len(path.read_text().splitlines()) < 2000 for path in tmp_path.glob("*/metrics.csv"))
    wait_until_gone(children)
