"""A run on ImageNet's path, from encoded images in worker processes to the tables of -C and -R, on a small stand-in."""

import dataclasses
import os
import signal

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("grain", reason="the experiments need pip install crsam_jax[experiments]")

import jax

from experiments.data import imagenet
from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.training.evaluate import evaluate_run
from experiments.training.logs import Log, read_epochs, read_steps
from experiments.training.restore import restore
from experiments.training.run_folder import steps_of
from experiments.training.train import train
from tests.experiments.prepared import prepare

NAME = "imagenet-resnet50"
RECIPE = dataclasses.replace(
    recipes.get(NAME), model="resnet18", model_options={"width": 8, "stage_sizes": (1, 1)}, method="sam",
    image_size=32, batch_size=16, epochs=4, learning_rate=0.1, warmup_epochs=1.0,
)  # fmt: skip
CLASSES = np.array([3, 250, 500, 999])
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])
TRAINING, VALIDATION = 70, 21  # 4 batches an epoch; the last evaluation batch is padded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]


def photographs(count, classes, seed):
    """Noisy images of several sizes in the colour of their class."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, len(classes), count)
    images = [
        np.clip(COLOURS[kind] + rng.normal(0, 30, (*rng.integers(36, 60, 2), 3)), 0, 255).astype(np.uint8)
        for kind in kinds
    ]
    return images, classes[kinds]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    anything = (None, None, 3)
    splits = {"train": photographs(TRAINING, CLASSES, 0), "validation": photographs(VALIDATION, CLASSES, 1)}
    prepare(path, "imagenet2012", "5.1.0", anything, splits, num_classes=1000)
    for corruption in ("fog_1", "fog_2", "snow_1", "snow_2"):
        corrupted = {"validation": photographs(VALIDATION, CLASSES, 2 if corruption == "snow_2" else 1)}
        prepare(path, f"imagenet2012_corrupted/{corruption}", "3.1.0", anything, corrupted, num_classes=1000)
    prepare(path, "imagenet_r", "0.2.0", anything, {"test": photographs(9, CLASSES[:2], 3)}, num_classes=1000)
    return path


@pytest.fixture(scope="module")
def run_of(data_dir):
    return lambda folder, **changes: Run(
        **({"out": folder, "data_dir": data_dir, "devices": 1, "workers": 0, "log_steps": 1} | changes)
    )


@pytest.fixture(scope="module")
def whole(run_of, tmp_path_factory):
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return train(NAME, RECIPE, run_of(folder))


def test_it_learns_from_worker_processes(whole):
    rows = read_epochs(whole / "metrics.csv")
    assert [row.step for row in rows] == [4, 8, 12, 16]
    assert rows[-1].train_loss < rows[0].train_loss / 2
    assert rows[-1].test_accuracy > 60


def test_stopped_within_an_epoch_it_goes_on_at_the_very_batch(whole, run_of, tmp_path, monkeypatch):
    log_step = Log.step

    def with_signal(self, step, values):
        log_step(self, step, values)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", with_signal)
        with pytest.raises(SystemExit):
            train(NAME, RECIPE, run_of(tmp_path))
    assert steps_of(tmp_path)[-1] == 6
    train(NAME, RECIPE, run_of(tmp_path))
    found, wanted = (restore(path, run=run_of(path)).state for path in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert read_steps(tmp_path / "steps.jsonl") == read_steps(whole / "steps.jsonl")


def test_worker_processes_change_nothing(whole, run_of, tmp_path):
    train(NAME, RECIPE, run_of(tmp_path, workers=2))
    assert read_steps(tmp_path / "steps.jsonl") == read_steps(whole / "steps.jsonl")


def test_imagenet_c_is_the_mean_over_corruptions_and_severities(whole, run_of, monkeypatch):
    monkeypatch.setattr(imagenet, "CORRUPTIONS", ("fog", "snow"))
    monkeypatch.setattr(imagenet, "SEVERITIES", (1, 2))
    clean = evaluate_run(whole, run=run_of(whole))
    corrupted = evaluate_run(whole, "imagenet-c", run=run_of(whole))
    monkeypatch.setattr(imagenet, "CORRUPTIONS", ("snow",))
    monkeypatch.setattr(imagenet, "SEVERITIES", (2,))
    other = evaluate_run(whole, "imagenet-c", run=run_of(whole))
    assert other != clean
    # Three of the four are the clean images again.
    assert corrupted.loss == pytest.approx((3 * clean.loss + other.loss) / 4)
    assert corrupted.accuracy == pytest.approx((3 * clean.accuracy + other.accuracy) / 4)


def test_imagenet_r_answers_only_the_classes_that_occur(whole, run_of):
    restricted = evaluate_run(whole, "imagenet-r", run=run_of(whole))
    assert restricted.accuracy > 60
    # Two possible answers: a cross-entropy over 1000 of which two remain is that of two.
    assert restricted.loss < np.log(2)


def test_imagenet_c_is_refused_for_a_network_of_other_data(tmp_path):
    recipe = dataclasses.replace(recipes.get("digits-convnet"), epochs=1, model_options={"width": 4})
    train("digits-convnet", recipe, Run(out=tmp_path, devices=1))
    with pytest.raises(ValueError, match="imagenet-c is for networks trained on ImageNet"):
        evaluate_run(tmp_path, "imagenet-c", run=Run(devices=1))
