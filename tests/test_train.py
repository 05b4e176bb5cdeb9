"""Training runs: they learn, stop, go on where they were, and refuse what they must."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import recipes
from experiments.configs import Run
from experiments.evaluate import evaluate_run
from experiments.logs import Log, read_epochs, read_steps
from experiments.restore import checkpoint_steps, restore
from experiments.train import train

NAME = "digits-convnet"
RECIPE = dataclasses.replace(
    recipes.get(NAME), method="sam", epochs=15, model_options={"width": 8}
)  # fmt: skip
STEPS = 20  # an epoch

pytestmark = pytest.mark.usefixtures("compiled")


def run_of(folder, **changes):
    return Run(**({"out": folder, "devices": 1, "log_steps": 5} | changes))


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    return train(NAME, RECIPE, run_of(tmp_path_factory.mktemp("whole")))


def assert_same_run(folder, expected):
    """Parameters, optimizer, metrics, all bit by bit; times may differ."""
    found, wanted = (restore(path, run=run_of(path)).state for path in (folder, expected))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert read_steps(folder / "steps.jsonl") == read_steps(expected / "steps.jsonl")
    rows = [
        [
            row._replace(images_per_second=0.0, waiting_percent=0.0, seconds=0.0)
            for row in read_epochs(path / "metrics.csv")
        ]
        for path in (folder, expected)
    ]
    assert rows[0] == rows[1]


def test_training_learns(whole):
    rows = read_epochs(whole / "metrics.csv")
    assert [row.epoch for row in rows] == list(range(1, RECIPE.epochs + 1))
    assert rows[-1].test_accuracy > 80
    assert rows[-1].train_loss < rows[0].train_loss / 2


def test_diagnostics_of_the_optimizer_stand_beside_the_loss(whole):
    lines = read_steps(whole / "steps.jsonl")
    assert [line["step"] for line in lines] == list(range(5, RECIPE.epochs * STEPS + 1, 5))
    assert all(line["loss_plus"] > line["loss"] and line["curvature"] != 0 for line in lines)
    assert list(whole.glob("events.out.tfevents.*"))


def test_a_checkpoint_evaluates_to_what_was_logged(whole):
    rows = read_epochs(whole / "metrics.csv")
    for step in checkpoint_steps(whole)[-2:]:
        result = evaluate_run(whole, step=step, run=run_of(whole))
        [row] = [row for row in rows if row.step == step]
        assert result == pytest.approx((row.test_loss, row.test_accuracy, row.calibration_error), rel=1e-6)


def test_killed_and_gone_on_equals_uninterrupted(whole, compiled, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "experiments", "train", NAME, "--method", "sam",
        "--epochs", str(RECIPE.epochs), "--model-options.width", "8", "--out", str(folder), "--devices", "1",
        "--log-steps", "5", "--checkpoint-steps", "13",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_steps(folder / "steps.jsonl")) >= 15:  # in the fourth epoch
            break
        time.sleep(0.002)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert len(read_epochs(folder / "metrics.csv")) < RECIPE.epochs
    train(NAME, RECIPE, run_of(folder))
    assert_same_run(folder, whole)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_and_the_run_goes_on(kind, whole, tmp_path, monkeypatch):
    log_step = Log.step

    def with_signal(self, step, values):
        log_step(self, step, values)
        if step == 35:
            os.kill(os.getpid(), kind)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", with_signal)
        with pytest.raises(SystemExit) as exit_:
            train(NAME, RECIPE, run_of(tmp_path))
    assert exit_.value.code == 128 + kind
    assert checkpoint_steps(tmp_path)[-1] == 35
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    train(NAME, RECIPE, run_of(tmp_path))
    assert_same_run(tmp_path, whole)


def test_an_epoch_may_be_a_single_step(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="base", batch_size=1000, epochs=2)
    rows = read_epochs(train(NAME, recipe, run_of(tmp_path)) / "metrics.csv")
    assert [row.step for row in rows] == [1, 2]
    assert all(row.seconds > 0 and row.images_per_second > 0 for row in rows)


def test_a_complete_run_is_left_as_it_is(whole):
    before = (whole / "metrics.csv").read_text()
    assert train(NAME, RECIPE, run_of(whole)) == whole
    assert (whole / "metrics.csv").read_text() == before


def test_another_runs_folder_is_refused(whole):
    with pytest.raises(FileExistsError, match="method sam there, base here"):
        train(NAME, dataclasses.replace(RECIPE, method="base"), run_of(whole))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="not a run"):
        train(NAME, RECIPE, run_of(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="base", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"not finite .*step (\d+) \(epoch 1\).*1e\+38") as error:
        train(NAME, recipe, run_of(tmp_path, checkpoint_steps=1))
    for step in checkpoint_steps(tmp_path):
        assert f"last checkpoint is that of step {step}" in str(error.value)
        leaves = jax.tree.leaves(restore(tmp_path, step, run_of(tmp_path)).state.params)
        assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="base", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="There is no checkpoint"):
        train(NAME, recipe, run_of(tmp_path))


def test_checkpoints_are_the_newest_few_and_every_kth_epoch(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="base", epochs=6)
    train(NAME, recipe, run_of(tmp_path, keep=1, keep_every=2))
    assert checkpoint_steps(tmp_path) == [2 * STEPS, 4 * STEPS, 6 * STEPS]
    with pytest.raises(FileNotFoundError, match=r"step 20 .*40, 80, 120"):
        restore(tmp_path, step=STEPS, run=run_of(tmp_path))
