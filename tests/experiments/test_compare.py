"""Comparisons: the arms, the main job's data, tables and differences, and what an interruption leaves."""

import csv
import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from sklearn.datasets import load_digits

from experiments.data import digits, subset
from experiments.data.inputs import load
from experiments.settings import overrides, recipes
from experiments.settings.configs import Compare, Run
from experiments.studies import arms, compare, jobs, summary
from experiments.studies.jobs import Job, Result
from experiments.studies.summary import paired, seeds_needed
from experiments.training import optimizers
from experiments.training.logs import read_epochs
from experiments.training.optimizers import METHODS

pytestmark = pytest.mark.usefixtures("compiled")

TINY = dataclasses.replace(
    recipes.get("digits"), epochs=2, batch_size=32, examples_per_class=7, model_options={"width": 4}
)  # fmt: skip
RATE = TINY.per_method["sam"]["learning_rate"]
QUICK = Run(keep=None, log_steps=0, probe_examples=20, devices=1)
TWO = Compare(methods=("base", "sam"), seeds=2)


def result(arm, seed, accuracy, seconds=1.0):
    return Result(arm, seed, "", 2, accuracy, 0.5, 0.1, accuracy, 1.0, 50.0, 0.1, 2.0, None, None, 1.0, 10.0, seconds)


def run_of(folder):
    return dataclasses.replace(QUICK, out=folder)


@pytest.fixture(scope="module")
def folder(compiled, tmp_path_factory):
    """Of a comparison that ran to its end."""
    return compare.compare("digits", TINY, TWO, {}, run_of(tmp_path_factory.mktemp("compare")))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_parts_of_the_data_share_no_image_and_hold_all_of_it():
    data = digits.load()
    parts = [*subset.split_validation(data.train, 0.5, seed=0), data.test]
    assert [len(part.labels) for part in parts] == [500, 500, 797]
    everything = np.concatenate([part.images.reshape(len(part.images), -1) for part in parts])
    whole = (15 * load_digits().images).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, everything)) == sorted(map(bytes, whole))
    for part in parts:
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() <= 1.15 * counts.min()


def test_validation_and_test_do_not_depend_on_seed_and_number_of_training_images():
    few = dataclasses.replace(TINY, evaluate_on="validation", seed=3)
    np.testing.assert_array_equal(
        load(few).test.images, load(dataclasses.replace(few, seed=4, examples_per_class=40)).test.images
    )
    assert not np.array_equal(load(few).train.images, load(dataclasses.replace(few, seed=4)).train.images)


def test_without_held_out_data_there_is_no_validation():
    with pytest.raises(ValueError, match="--validation-fraction"):
        load(dataclasses.replace(TINY, evaluate_on="validation", validation_fraction=0.0))


def test_a_run_writes_results_recipes_tables_and_plots(folder):
    rows = read(folder / "runs.csv")
    assert [(row["arm"], row["seed"]) for row in rows] == [("base", "0"), ("base", "1"), ("sam", "0"), ("sam", "1")]
    assert rows[2]["settings"] == f"learning_rate={RATE:g} sam.rho={TINY.sam.rho:g}"
    assert float(rows[2]["evaluations_per_step"]) == 2
    last = read_epochs(folder / "sam-seed1" / "metrics.csv")[-1]
    assert float(rows[3]["test_accuracy"]) == last.test_accuracy
    assert float(rows[3]["calibration_error"]) == last.calibration_error
    assert json.loads((folder / "recipes.json").read_text())["sam"]["learning_rate"] == RATE
    assert "| SAM |" in (folder / "table.md").read_text()
    assert "| against SGD |" in (folder / "table.md").read_text()
    for name in ("curves.png", "time.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_complete_runs_are_read_and_more_seeds_are_added(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(jobs, "train", lambda name, recipe, run, quiet: trained.append((recipe.method, recipe.seed)))
    compare.compare("digits", TINY, TWO, {}, run_of(folder))
    assert trained == []
    with pytest.raises(FileExistsError, match="batch_size 32 there, 16 here"):
        compare.compare("digits", TINY, TWO, {"batch_size": 16}, run_of(folder))


def test_several_processes_find_what_one_finds(folder, tmp_path, cache_folder):
    config = dataclasses.replace(TWO, processes=2)
    found = compare.compare("digits", TINY, config, {}, run_of(tmp_path / "run"))
    names = ("arm", "seed", "settings", "epochs", "test_accuracy", "train_loss")
    rows = [[[row[name] for name in names] for row in read(path / "runs.csv")] for path in (found, folder)]
    for one, other in zip(*rows, strict=True):
        assert one[:5] == other[:5]
        assert float(one[5]) == pytest.approx(float(other[5]), rel=1e-4)


def test_the_same_seed_gives_the_same_run(folder, tmp_path):
    job = Job("sam", arms.resolve(TINY, "sam", {}, 1), tmp_path / "again")
    jobs.carry_out("digits", [job], QUICK)
    again = jobs.read_result(job)._replace(seconds=None, seconds_per_step=None)
    assert again == jobs.read_result(job._replace(folder=folder / "sam-seed1"))._replace(
        seconds=None, seconds_per_step=None
    )


def test_an_interruption_leaves_the_table_of_complete_runs(tmp_path, monkeypatch):
    real = jobs.train

    def interrupted(name, recipe, run, quiet):
        if (recipe.method, recipe.seed) == ("sam", 1):
            raise SystemExit(130)
        return real(name, recipe, run, quiet)

    monkeypatch.setattr(jobs, "train", interrupted)
    with pytest.raises(SystemExit):
        compare.compare("digits", TINY, TWO, {}, run_of(tmp_path / "run"))
    base, sam = (tmp_path / "run" / "table.md").read_text().splitlines()[2:4]
    assert (base.rstrip(" |")[-1], sam.rstrip(" |")[-1]) == ("2", "1")  # seeds


def test_comparisons_may_begin_at_another_seed(tmp_path):
    config = Compare(methods=("base",), seeds=2, first_seed=1000)
    rows = read(compare.compare("digits", TINY, config, {}, run_of(tmp_path)) / "runs.csv")
    assert [row["seed"] for row in rows] == ["1000", "1001"]


def test_a_loss_that_is_not_finite_counts_as_a_guess(tmp_path):
    config = Compare(methods=("base", "base,learning_rate=1e38"), seeds=1)
    found = compare.compare("digits", TINY, config, {}, run_of(tmp_path / "run"))
    fine, failed = read(found / "runs.csv")
    assert fine["error"] == ""
    assert "not finite" in failed["error"]
    assert float(failed["test_accuracy"]) == 10
    assert float(failed["test_loss"]) == np.inf
    assert "1, 1 failed" in (found / "table.md").read_text()


def test_equal_evaluations_are_more_epochs_for_the_cheap(tmp_path):
    config = dataclasses.replace(TWO, seeds=1, budget="evaluations")
    rows = read(compare.compare("digits", TINY, config, {}, run_of(tmp_path / "run")) / "runs.csv")
    assert [(row["arm"], int(row["epochs"])) for row in rows] == [("base", 4), ("sam", 2)]


def test_the_reference_must_be_an_arm():
    with pytest.raises(ValueError, match="no arm to take as --against 'gsam': did you mean 'sam'"):
        compare.compare("digits", TINY, dataclasses.replace(TWO, against=("gsam",)), {}, QUICK)


def test_the_table_is_the_mean_and_the_sample_deviation_of_the_last_epochs():
    results = {"base": [result("base", 0, 80.0), result("base", 1, 90.0)]}
    [row] = summary.summarize(results, {"base": "SGD"}, "base", 0.5)
    assert (row["test_accuracy"], row["test_accuracy_std"]) == (85.0, pytest.approx(np.std([80, 90], ddof=1)))
    _, [line] = summary._main_table(results, [row])
    assert line[:2] == ["SGD", f"85.0 ± {np.std([80, 90], ddof=1):.1f}"]
    assert line[-2:] == ["1.00", "2"]


def test_time_is_relative_to_the_reference():
    results = {"base": [result("base", 0, 80.0, 2.0)], "sam": [result("sam", 0, 81.0, 5.0)]}
    rows = summary.summarize(results, {"base": "SGD", "sam": "SAM"}, "base", 0.5)
    assert [row["relative_time"] for row in rows] == [1.0, 2.5]
    [alone] = summary.summarize({"sam": results["sam"]}, {"sam": "SAM"}, "base", 0.5)
    assert alone["relative_time"] is None


def test_differences_are_taken_seed_by_seed():
    results = {
        "base": [result("base", seed, accuracy) for seed, accuracy in enumerate((70.0, 80.0, 90.0))],
        "sam": [result("sam", seed, accuracy) for seed, accuracy in enumerate((71.0, 82.0, 93.0))],
        "crsam": [result("crsam", 2, 91.0)],
    }
    _, sam, crsam = summary.summarize(results, dict(zip(results, "abc", strict=True)), "base", 0.5)
    expected = paired({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 0.0), comparisons=2)
    assert (sam["difference"], sam["low"], sam["high"]) == (2.0, expected.low, expected.high)
    assert (crsam["difference"], crsam["pairs"], crsam["seeds_needed"]) == (1.0, 1, None)


def test_intervals_cover_as_often_as_they_say():
    """All four intervals of a table at once, in 95 of 100 tables."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        reference = dict(enumerate(rng.normal(size=8)))
        found = [paired(dict(enumerate(rng.normal(0.5, 2.0, 8))), reference, comparisons=4) for _ in range(4)]
        covered += all(difference.low < 0.5 < difference.high for difference in found)
    assert 930 <= covered <= 975  # not independent: the reference is shared


def test_the_number_of_seeds_finds_the_difference_four_times_in_five():
    rng = np.random.default_rng(0)
    needed = seeds_needed(deviation=2.0, difference=1.0, comparisons=3)
    samples = rng.normal(1.0, 2.0, (4000, needed))
    zero = dict.fromkeys(range(needed), 0.0)
    found = np.mean([paired(dict(enumerate(row)), zero, comparisons=3).low > 0 for row in samples])
    assert found == pytest.approx(0.8, abs=0.03)
    assert seeds_needed(float("nan"), 1.0) is None
    assert seeds_needed(1e6, 1.0) is None


def test_every_method_takes_a_step_and_counts_its_evaluations():
    params = {"norm": jax.numpy.ones((3, 2))}  # the name that sam-on perturbs
    loss_fn = lambda params, batch: (jax.numpy.sum(params["norm"] ** 4), None)
    for name, method in METHODS.items():
        recipe = arms.resolve(TINY, name, {"late_start": 0.0}, 0)  # the first step is a full one
        tx = optimizers.optimizer(recipe, loss_fn, steps_per_epoch=2)
        grads = jax.grad(loss_fn, has_aux=True)(params, None)[0]
        updates, state = tx.update(grads, tx.init(params), params, batch=0.0)
        assert bool(jax.numpy.all(jax.numpy.isfinite(optax.apply_updates(params, updates)["norm"]))), name
        assert optimizers.evaluations_per_step(recipe, state) == method.evaluations, name


def test_settings_go_to_the_method_they_belong_to_and_explicit_ones_count_more():
    recipe = dataclasses.replace(
        TINY, per_method={"sam": {"learning_rate": 0.5, "sam.rho": 0.7}, "gsam": {"sam.rho": 1.0}}
    )
    assert arms.resolve(recipe, "wsam", {}, 0).sam.rho == 0.7  # its parent's
    own = arms.resolve(recipe, "gsam", {}, 0)
    assert (own.learning_rate, own.sam.rho, own.per_method) == (TINY.learning_rate, 1.0, {})
    assert arms.resolve(recipe, "base", {}, 0).learning_rate == TINY.learning_rate
    assert arms.resolve(recipe, "sam", {"sam.rho": 0.1}, 0).sam.rho == 0.1
    last = arms.resolve(recipe, "sam-1.5x,sam.rho=0.3", {"sam.rho": 0.1, "epochs": 4}, 5)
    assert (last.method, last.epochs, last.seed, last.sam.rho, last.learning_rate) == ("sam", 6, 5, 0.3, 0.5)
    assert arms.label(recipe, "sam-1.5x,sam.rho=0.3") == "SAM, 1.5× epochs, rho = 0.3"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crsam.roh": 1.0}, "did you mean 'crsam.rho'"),
        ({"lerning_rate": 1.0}, "did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float, got 'fast'"),
        ({"epochs": 2.5}, "epochs must be of type int, got 2.5"),
        ({"crsam.penalty": "lin"}, "did you mean 'linear'"),
        ({"learning_rate.x": 1.0}, "no setting 'learning_rate.x'"),
    ],
)
def test_a_bad_setting_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        overrides.changed(TINY, changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "digitz"], "digits"),
        (["compare", "digits", "--methods", "crsm"], "did you mean 'crsam'"),
        (["compare", "digits", "--sedes", "3"], "--seeds"),
        (["compare", "digits", "--seed", "3"], "here there are --methods and --seeds"),
        (["tune", "digits", "--space", "sam.rho=1:0"], "key=low:high"),
    ],
)
def test_a_bad_option_is_answered_with_the_valid_ones(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
