"""The main job: its data, its settings, its table, and what an interruption leaves."""

import csv
import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from experiments import compare, configs, runs, training
from experiments.data import digits
from experiments.methods import METHODS, evaluations_per_step, settings_of, with_settings

pytestmark = pytest.mark.usefixtures("compiled")

TINY = configs.Digits(methods=("sgd", "sam"), seeds=2, train_examples=64, epochs=2, batch_size=32, width=4)


def record(method, seed, epoch, accuracy, seconds=1.0):
    return training.EpochRecord(method, seed, epoch, 1.0, 50.0, 0.5, accuracy, 0.1, 2.0, 1.0, seconds)


def test_the_parts_of_the_data_share_no_image_and_hold_all_of_it():
    parts = digits.load(500)
    assert [len(part.labels) for part in parts] == [500, 500, 797]
    everything = np.concatenate([part.images.reshape(len(part.images), -1) for part in parts])
    whole = digits.load_digits().images.astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, everything)) == sorted(map(bytes, whole))
    for part in parts:
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() <= 1.15 * counts.min()


def test_validation_and_test_do_not_depend_on_the_number_of_training_images():
    few, many = digits.load(100), digits.load(600)
    np.testing.assert_array_equal(few.validation.images, many.validation.images)


@pytest.mark.parametrize("train_examples", [5, 1250])
def test_an_impossible_split_says_what_is_possible(train_examples):
    with pytest.raises(ValueError, match=f"between 10 and 1197.*got {train_examples}"):
        digits.load(train_examples)


def test_a_batch_order_covers_each_example_at_most_once():
    data = (np.arange(70), np.arange(70))
    batches = list(training._batches(data, 32, np.random.default_rng(0)))
    seen = np.concatenate([batch[0] for batch in batches])
    assert len(seen) == len(set(seen)) == 64


def test_the_table_is_the_mean_and_the_sample_deviation_of_the_last_epochs():
    config = dataclasses.replace(TINY, methods=("sgd",), epochs=2)
    records = [record("sgd", 0, 1, 0.0), record("sgd", 0, 2, 80.0), record("sgd", 1, 1, 0.0), record("sgd", 1, 2, 90.0)]
    row = compare.summary(config, records).splitlines()[2]
    assert row.split(" | ")[:2] == ["| SGD", f"85.0 ± {np.std([80, 90], ddof=1):.1f}"]
    assert row.endswith("| 1.00 | 2 |")


def test_time_is_relative_to_sgd_without_the_epoch_that_compiles():
    records = [
        record("sgd", 0, 1, 0, 100.0),
        record("sgd", 0, 2, 0, 2.0),
        record("sam", 0, 1, 0, 1.0),
        record("sam", 0, 2, 0, 5.0),
    ]
    assert compare._relative_time("sam", records) == "2.50"
    assert compare._relative_time("sam", records[2:]) == "–"


def test_a_run_writes_metrics_settings_table_and_plot(tmp_path):
    folder = compare.compare(TINY, tmp_path / "run")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert len(rows) == 2 * 2 * 2
    assert {row["method"] for row in rows} == {"sgd", "sam"}
    assert json.loads((folder / "config.json").read_text())["train_examples"] == 64
    assert "| SAM |" in (folder / "table.md").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run():
    def final():
        program = training.make_program(TINY, "sam")
        *_, last = training.train(TINY, "sam", 1, training.make_task(TINY, 1), program)
        return last._replace(seconds_per_step=0)

    assert final() == final()


def test_an_interruption_leaves_the_metrics_and_the_table_of_complete_runs(tmp_path, monkeypatch):
    real_train = compare.train

    def interrupted(config, method, seed, task, program):
        for number, row in enumerate(real_train(config, method, seed, task, program)):
            if (method, seed, number) == ("sam", 1, 1):
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(compare, "train", interrupted)
    folder = compare.compare(TINY, tmp_path / "run")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert len(rows) == 7  # all but the last epoch of the last run
    sgd, sam = (folder / "table.md").read_text().splitlines()[2:]
    assert (sgd.rstrip(" |")[-1], sam.rstrip(" |")[-1]) == ("2", "1")  # seeds


def test_no_earlier_result_is_overwritten(tmp_path):
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(FileExistsError, match="--out"):
        runs.new_folder("digits", tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name():
    config = dataclasses.replace(TINY, sgd=configs.Sgd(learning_rate=1e30), epochs=5)
    with pytest.raises(FloatingPointError, match="sgd, seed 0: the training loss is nan"):
        list(training.train(config, "sgd", 0, training.make_task(config, 0), training.make_program(config, "sgd")))


def test_every_method_takes_a_step_and_counts_its_evaluations():
    params = {"w": jax.numpy.ones((3, 2))}
    loss_fn = lambda params, batch: (jax.numpy.sum(params["w"] ** 4), None)
    for name, method in METHODS.items():
        tx = training.optimizer(TINY, name, loss_fn)
        grads = jax.grad(loss_fn, has_aux=True)(params, None)[0]
        updates, state = tx.update(grads, tx.init(params), params, batch=0.0)
        assert bool(jax.numpy.all(jax.numpy.isfinite(optax.apply_updates(params, updates)["w"]))), name
        assert evaluations_per_step(name, state) == method.evaluations, name


def test_settings_go_to_the_method_they_belong_to():
    changed = with_settings(TINY, "gsam", configs.Sam(0.5, 0.7))
    assert settings_of(changed, "sam") == configs.Sam(0.5, 0.7)
    assert changed.crsam == TINY.crsam


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "digitz"], "digits"),
        (["compare", "digits", "--methods", "crsm"], "Did you mean crsam"),
        (["compare", "digits", "--sedes", "3"], "--seeds"),
    ],
)
def test_a_bad_option_is_answered_with_the_valid_ones(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
