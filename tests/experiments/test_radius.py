"""Independent searches: a miniature of the whole, and the interval over searches."""

import csv
import dataclasses

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.studies import radius
from experiments.studies.jobs import Result

pytestmark = pytest.mark.usefixtures("compiled")

TINY = dataclasses.replace(
    recipes.get("digits"), epochs=1, batch_size=32, examples_per_class=7, test_examples_per_class=5,
    model_options={"width": 4}, per_method={},
)  # fmt: skip


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_miniature_of_the_searches(tmp_path, monkeypatch):
    monkeypatch.setitem(radius.TASKS, "digits", (TINY, 1))
    options = dict(out=tmp_path, searches=2, trials=2, second_round=4, seeds=2, methods=("sam", "crsam"))
    radius.radius(("digits",), **options)
    rows = read(tmp_path / "contrasts.csv")
    assert [(row["arm"], row["against"]) for row in rows] == [("crsam", "sam"), ("crsam", radius.NO_PENALTY)]
    assert {(row["searches"], row["seeds"]) for row in rows} == {("2", "4")}
    seeds = [{row["seed"] for row in read(tmp_path / "digits" / f"search{i}" / "compare" / "runs.csv")} for i in (0, 1)]
    assert seeds == [{"1000", "1001"}, {"1002", "1003"}]
    trials = [read(tmp_path / "digits" / f"search{i}" / "tune" / "trials.csv") for i in (0, 1)]
    assert all(len(search) == 2 * 6 for search in trials)
    assert trials[0][0]["learning_rate"] != trials[1][0]["learning_rate"]
    before = (tmp_path / "contrasts.csv").read_text()
    radius.radius(("digits",), **options)  # everything is complete, and read
    assert (tmp_path / "contrasts.csv").read_text() == before


def test_the_interval_is_students_over_the_means_of_searches():
    gains = [[1.0, 2.0], [0.0, 4.0, 5.0], [3.0]]
    result = lambda arm, seed, accuracy: Result(arm, seed, "", 1, accuracy)
    found = [
        [result(*row) for seed, gain in enumerate(one) for row in (("sam", seed, 50.0), ("crsam", seed, 50 + gain))]
        for one in gains
    ]
    row = radius.contrast("digits", "crsam", "sam", found)
    expected = stats.ttest_1samp([np.mean(one) for one in gains], 0)
    assert (row.searches, row.seeds, row.mean) == (3, 6, pytest.approx(2.5))
    assert (row.low, row.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert row.p == pytest.approx(expected.pvalue)


def test_contrasts_are_adjusted_over_tasks(tmp_path):
    rows = [radius.Contrast(task, "crsam", "sam", 5, 100, -0.5, -1.0, 0.0, p) for task, p in (("a", 0.02), ("b", 0.04))]
    radius.write_contrasts(rows, tmp_path)
    assert [line.split("|")[-2].strip() for line in (tmp_path / "contrasts.md").read_text().splitlines()[2:]] == [
        "0.040", "0.040"
    ]  # fmt: skip
    assert "−0.50 (−1.00 to +0.00)" in (tmp_path / "contrasts.md").read_text()


def test_a_single_search_has_no_interval_and_leaves_the_other_tasks_p(tmp_path):
    rows = [radius.Contrast("a", "crsam", "sam", 5, 100, -0.5, -1.0, 0.0, 0.02)]
    rows.append(radius.contrast("b", "crsam", "sam", [[Result("sam", 0, "", 1, 5.0), Result("crsam", 0, "", 1, 6.0)]]))
    radius.write_contrasts(rows, tmp_path)
    lines = (tmp_path / "contrasts.md").read_text().splitlines()[2:]
    assert [line.split("|")[-3:-1] for line in lines] == [
        [" −0.50 (−1.00 to +0.00) ", " 0.040 "], [" +1.00 (a single value, no interval) ", " – "]
    ]  # fmt: skip


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        radius.radius(("digit",))
    with pytest.raises(ValueError, match="Name a task: digits, "):
        radius.radius(())
    with pytest.raises(ValueError, match="--methods must hold sam and crsam, got sam"):
        radius.radius(("digits",), methods=("sam",))
