"""The map of gains: every cell is a task with its own search, and all runs have the same number of steps."""

import dataclasses

import matplotlib.image
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.studies import regimes
from experiments.studies.jobs import Result
from experiments.studies.summary import paired
from tests.experiments.test_radius import read

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.slow
def test_a_miniature_of_the_map(tmp_path, monkeypatch):
    recipe = dataclasses.replace(regimes.TASKS["digits"].recipe, batch_size=40)  # for eight devices
    monkeypatch.setitem(regimes.TASKS, "digits", regimes.Task(recipe, (4, 8), 4))
    monkeypatch.setattr(regimes, "NOISE", (0.4,))
    options = dict(out=tmp_path, trials=2, trial_seeds=1, seeds=2)
    regimes.regimes(("digits",), **options)
    rows = read(tmp_path / "digits" / "map.csv")
    expected = [("0.4", size, method) for size in ("4", "8") for method in regimes.METHODS[1:]]
    assert [(row["noise"], row["examples"], row["method"]) for row in rows] == expected
    for size, epochs in ((4, "4"), (8, "2")):
        folder = tmp_path / "digits" / f"noise0.4-images{size}"
        runs = read(folder / "compare" / "runs.csv")
        assert {(row["seed"], row["epochs"]) for row in runs} == {("2100", epochs), ("2101", epochs)}
        assert len(read(folder / "tune" / "trials.csv")) == 2 * len(regimes.METHODS)
    assert len((tmp_path / "digits" / "map.md").read_text().splitlines()) == 2 + 2
    before = (tmp_path / "digits" / "map.csv").read_bytes()
    regimes.regimes(("digits",), **options)  # everything is complete, and read
    assert (tmp_path / "digits" / "map.csv").read_bytes() == before


def test_every_cell_has_the_same_steps():
    for task in regimes.TASKS.values():
        found = list(regimes.cells(task))
        assert len(found) == len(regimes.NOISE) * len(task.examples)
        for noise, examples, recipe in found:
            assert (recipe.label_noise, recipe.examples_per_class) == (noise, examples)
            assert recipe.epochs * (10 * examples // recipe.batch_size) == task.steps


def test_gains_are_paired_and_simultaneous_within_a_cell(tmp_path):
    rng = np.random.default_rng(0)
    base, sam, msam = rng.normal(50, 5, (3, 6))
    runs = [
        Result(arm, seed, "", 1, float(value), train_accuracy=80.0)
        for arm, values in (("base", base), ("sam", sam), ("msam", msam))
        for seed, value in enumerate(values)
    ]
    found = {row.method: row for row in regimes.gains("digits", 0.4, 10, runs)}
    expected = paired(dict(enumerate(sam)), dict(enumerate(base)), comparisons=2)
    assert list(found) == ["msam", "sam"]
    assert (found["sam"].gain, found["sam"].low, found["sam"].high) == pytest.approx(expected[:3])
    assert (found["sam"].base_accuracy, found["sam"].base_train_accuracy) == pytest.approx((base.mean(), 80.0))
    regimes.write_map([*found.values()], tmp_path)
    assert matplotlib.image.imread(tmp_path / "map.png").std() > 0.05
    [line] = (tmp_path / "map.md").read_text().splitlines()[2:]
    assert line.startswith(f"| 40% | 100 | {base.mean():.1f} | 80.0 | ")


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        regimes.regimes(("digit",))
    with pytest.raises(ValueError, match="Name a task: digits, fashion"):
        regimes.regimes(())
