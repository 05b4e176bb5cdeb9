"""Training runs: they learn, stop, go on where they were, and refuse what they must."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.training.evaluate import evaluate_run
from experiments.training.export import export
from experiments.training.logs import Log, read_epochs, read_steps
from experiments.training.restore import restore
from experiments.training.run_folder import steps_of
from experiments.training.train import train

ROOT = Path(__file__).parents[2]
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
    for step in steps_of(whole)[-2:]:
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
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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
    assert steps_of(tmp_path)[-1] == 35
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
    for step in steps_of(tmp_path):
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
    assert steps_of(tmp_path) == [2 * STEPS, 4 * STEPS, 6 * STEPS]
    with pytest.raises(FileNotFoundError, match=r"step 20 .*40, 80, 120"):
        restore(tmp_path, step=STEPS, run=run_of(tmp_path))


def test_a_run_with_a_constant_rate_is_extended_bit_by_bit(tmp_path):
    long = dataclasses.replace(RECIPE, epochs=3, schedule="constant")
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    train(NAME, long, run_of(whole))
    train(NAME, dataclasses.replace(long, epochs=2), run_of(extended))
    train(NAME, long, run_of(extended))
    assert_same_run(extended, whole)
    with pytest.raises(FileExistsError, match="epochs 3 there, 1 here"):
        train(NAME, dataclasses.replace(long, epochs=1), run_of(extended))


def test_a_cosine_that_has_ended_cannot_be_extended(whole):
    with pytest.raises(FileExistsError, match=r"epochs 15 there, 16 here.*only runs with --schedule constant"):
        train(NAME, dataclasses.replace(RECIPE, epochs=16), run_of(whole))


def test_averages_and_traces_stand_beside_the_raw_numbers(tmp_path):
    recipe = dataclasses.replace(RECIPE, method="base", epochs=4, ema=0.9)
    first, last = read_epochs(train(NAME, recipe, run_of(tmp_path, evaluate_every=3, trace_probes=2)) / "metrics.csv")
    assert (first.epoch, last.epoch) == (3, 4)
    assert first.average_accuracy != first.test_accuracy
    assert first.trace is None
    assert last.normalized_trace == pytest.approx(last.trace / last.grad_norm, rel=1e-4)
    assert 0 < last.average_calibration_error < 1
    assert (last.seconds, first.seconds) > (0, 0)


def test_an_exported_file_holds_the_parameters(whole, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="export needs pip install safetensors")
    arrays = numpy.load_file(export(whole, tmp_path / "params.safetensors"))
    state = restore(whole, run=run_of(whole)).state
    assert len(arrays) == len(jax.tree.leaves((state.params, state.model_state)))
    np.testing.assert_array_equal(arrays["head/kernel"], state.params["head"]["kernel"][...])
    with pytest.raises(ValueError, match="--ema"):
        export(whole, tmp_path / "average.safetensors", average=True)


def test_weights_and_biases_gets_the_rows_of_a_run(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append((step, values)), finish=lambda exit_code: None)
    started = []
    wandb = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = dataclasses.replace(RECIPE, method="base", epochs=1)
    train(NAME, recipe, run_of(tmp_path, wandb="flat"))
    [row] = read_epochs(tmp_path / "metrics.csv")
    assert (started[0]["project"], started[0]["config"]["method"]) == ("flat", "base")
    assert [step for step, _ in seen] == [5, 10, 15, 20, 20]
    assert seen[-1][1]["epoch/test_accuracy"] == row.test_accuracy
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(NAME, recipe, run_of(tmp_path / "other", wandb="flat"))


def test_a_resolved_configuration_gives_the_run_back(tmp_path):
    """By name, file, --set and options, in that order; the config.json that results is the same recipe."""
    changes = tmp_path / "changes.json"
    changes.write_text(json.dumps({"epochs": 1, "sam": {"rho": 0.3}, "model_options.width": 4, "seed": 9}))
    command = [sys.executable, "-m", "experiments", "train"]
    rest = ["--devices", "1", "--keep", "1", "--log-steps", "0"]
    options = ["digits", "--method", "sam", "--config", str(changes), "--set", "sam.rho=0.4", "seed=3", "--seed", "2"]
    for folder, start in (("one", options), ("two", [str(tmp_path / "one" / "config.json")])):
        subprocess.run([*command, *start, *rest, "--out", str(tmp_path / folder)], check=True, cwd=ROOT)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert (one["sam"]["rho"], one["seed"], one["learning_rate"], one["model_options"]) == (0.4, 2, 0.151, {"width": 4})
    rows = [read_epochs(tmp_path / name / "metrics.csv")[-1].test_loss for name in ("one", "two")]
    assert rows[0] == rows[1]
