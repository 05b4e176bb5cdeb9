"""Searches: what is sampled, that the best is chosen on held-out data, and that it can be trained."""

import csv
import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.data.inputs import load
from experiments.settings import overrides, ranges, recipes
from experiments.settings.configs import Run, Tune
from experiments.studies import arms, jobs
from experiments.studies.spaces import WIDTH, neighbourhood, sample, shared_sample, space_of
from experiments.studies.tune import tune

pytestmark = pytest.mark.usefixtures("compiled")

TINY = dataclasses.replace(
    recipes.get("digits"), epochs=2, batch_size=32, examples_per_class=7, model_options={"width": 4}
)  # fmt: skip
CONFIG = Tune(methods=("base", "sam"), trials=3, seeds=2, space=("sam.rho=0.01:0.1",))


@pytest.fixture(scope="module")
def found(compiled, tmp_path_factory):
    """The folder of a search, and the recipes that were trained in it."""
    trained, real = [], jobs.train

    def train(name, recipe, run, quiet):
        trained.append(recipe)
        return real(name, recipe, run, quiet)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train", train)
        run = Run(out=tmp_path_factory.mktemp("tune"), keep=1, log_steps=0, devices=1)
        return tune("digits", TINY, CONFIG, {"weight_decay": 1e-3}, run), trained


def test_arms_have_equally_many_trials_on_held_out_data(found):
    _, trained = found
    assert [recipe.method for recipe in trained] == ["base", "base", "sam", "sam"] * 3
    assert [recipe.seed for recipe in trained] == [100, 101] * 6
    assert {recipe.evaluate_on for recipe in trained} == {"validation"}
    assert {recipe.weight_decay for recipe in trained} == {1e-3}
    assert all(0.003 <= recipe.learning_rate <= 0.3 for recipe in trained)  # for all arms
    assert all(0.01 <= recipe.sam.rho <= 0.1 for recipe in trained if recipe.method == "sam")
    held_out = {image.tobytes() for image in load(trained[0]).test.images}
    assert not held_out & {image.tobytes() for image in load(dataclasses.replace(TINY)).test.images}


def test_the_best_is_the_highest_mean_and_can_be_trained(found):
    folder, _ = found
    with (folder / "trials.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == "sam"]
    with (folder / "runs.csv").open() as file:
        runs = [row for row in csv.DictReader(file) if row["arm"] == "sam"]
    means = [np.mean([float(run["test_accuracy"]) for run in runs[i : i + 2]]) for i in (0, 2, 4)]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(means)
    best = rows[int(np.argmax(means))]
    recipe = arms.resolve(overrides.find(str(folder / "digits-tuned.json")), "sam", {}, 0)
    assert (recipe.learning_rate, recipe.sam.rho) == (float(best["learning_rate"]), float(best["sam.rho"]))
    assert (recipe.weight_decay, recipe.evaluate_on, recipe.epochs) == (1e-3, "test", 2)
    assert (folder / "trials.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_goes_on_with_more_trials(found, monkeypatch):
    folder, _ = found
    before = (folder / "runs.csv").read_text().splitlines()
    trained, real = [], jobs.train
    monkeypatch.setattr(jobs, "train", lambda *args, **kwargs: trained.append(args) or real(*args, **kwargs))
    more = dataclasses.replace(CONFIG, trials=4)
    tune("digits", TINY, more, {"weight_decay": 1e-3}, Run(out=folder, keep=1, log_steps=0, devices=1))
    assert len(trained) == 4
    assert set(before) < set((folder / "runs.csv").read_text().splitlines())


def test_without_held_out_data_there_is_no_search(tmp_path):
    with pytest.raises(ValueError, match="--validation-fraction"):
        tune("digits", dataclasses.replace(TINY, validation_fraction=0.0), CONFIG, {}, Run(out=tmp_path, devices=1))


def test_samples_fill_the_ranges_evenly_and_more_of_them_begin_alike():
    space = {"learning_rate": (0.01, 1.0), "sam.rho": (0.1, 0.4)}
    points = sample(space, 16)
    for name, (low, high) in space.items():
        place = np.sort([np.log(point[name] / low) / np.log(high / low) for point in points])
        assert np.all(np.abs(place - (np.arange(16) + 0.5) / 16) < 0.55 / 16 + 0.01)  # one in each sixteenth
    assert sample(space, 5) == points[:5]


def test_ranges_are_of_the_methods_own_settings_and_of_those_of_all():
    given = ("weight_decay=1e-4:1e-2", "crsam.rho=0.1:0.2")
    assert space_of("sam", 0.03, given) == {
        "learning_rate": (0.003, 0.3), "sam.rho": (0.02, 1.0), "weight_decay": (1e-4, 1e-2)
    }  # fmt: skip
    assert space_of("crsam", 0.03, given)["crsam.rho"] == (0.1, 0.2)
    for bad in ("sam.rho", "sam.rho=1", "sam.rho=0:1", "sam.rho=2:1", "sam.rho=a:b"):
        with pytest.raises(ValueError, match="key=low:high"):
            space_of("sam", 0.03, (bad,))


def test_the_recipe_of_a_search_is_readable(found):
    content = json.loads((found[0] / "digits-tuned.json").read_text())
    assert set(content["per_method"]) == {"base", "sam", "crsam"}


def test_methods_share_the_points_that_they_have_in_common():
    given = ("sam.rho=0.02:2", "crsam.rho=0.02:2", "weight_decay=1e-4:1e-2")
    spaces = {arm: space_of(arm, 0.1, given) for arm in ("base", "sam", "crsam")}
    found = shared_sample(spaces, 8)
    for base, sam, crsam in zip(*found.values(), strict=True):
        assert list(base) == ["learning_rate", "weight_decay"]
        assert base.items() <= sam.items()
        assert sam == {key.replace("crsam.", "sam."): value for key, value in crsam.items()}
        assert 0.02 <= sam["sam.rho"] <= 2
    assert shared_sample(spaces, 8, seed=1)["sam"] != found["sam"]


def test_the_second_round_stays_near_its_point_and_may_leave_the_range():
    space = {"learning_rate": (0.01, 1.0), "crsam.rho": (0.1, 1.0), "crsam.alpha": (0.01, 1.0)}
    near = neighbourhood(space, {"learning_rate": 0.1, "crsam.rho": 1.0})
    assert near["crsam.alpha"] == space["crsam.alpha"]  # not tried yet
    for name, width in (("learning_rate", 100.0), ("crsam.rho", 10.0)):
        low, high = near[name]
        assert np.log(high / low) == pytest.approx(WIDTH * np.log(width))
    assert near["crsam.rho"][1] > 1


def test_a_second_round_searches_around_the_best_of_shared_points(compiled, tmp_path):
    config = Tune(
        methods=("sam", "crsam"), trials=4, seeds=1, space=("sam.rho=0.02:2", "crsam.rho=0.02:2"), sobol_seed=2,
        share_points=True, second_round=4,
    )  # fmt: skip
    folder = tune("digits", TINY, config, {}, Run(out=tmp_path, keep=None, log_steps=0, devices=1))
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["round"]) for row in rows] == [
        (arm, number) for arm in ("sam", "crsam") for number in "1111" + "2222"
    ]
    sam, crsam = rows[:8], rows[8:]
    for ours, theirs in zip(sam[:4], crsam[:4], strict=True):
        assert (ours["learning_rate"], ours["sam.rho"]) == (theirs["learning_rate"], theirs["crsam.rho"])
        assert float(theirs["crsam.alpha"]) == TINY.crsam.alpha  # the recipe's
    order = np.argsort([-float(row["accuracy"]) for row in crsam[:4]], kind="stable")
    for trial, row in zip(order, crsam[4:], strict=True):  # one around each of the four
        factor = float(row["crsam.rho"]) / float(crsam[trial]["crsam.rho"])
        assert abs(np.log(factor)) <= WIDTH / 2 * np.log(100) + 0.01
    assert len({row["crsam.alpha"] for row in crsam[4:]}) == 4
    with (folder / "runs.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"102"}  # searches share no run
    best = max(crsam, key=lambda row: float(row["accuracy"]))
    tuned = arms.resolve(overrides.find(str(folder / "digits-tuned.json")), "crsam", {}, 0)
    assert tuned.crsam.alpha == float(best["crsam.alpha"])


def test_a_second_round_is_divided_among_four():
    with pytest.raises(ValueError, match="--second-round must be a multiple of four, got 6"):
        ranges.check(Tune(second_round=6))
