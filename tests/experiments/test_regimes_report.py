"""The tables of docs/regimes.md, recomputed from the published runs."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.studies import arms, radius, regimes, stronger
from experiments.studies.jobs import Result
from experiments.studies.summary import accuracies, paired, with_interval
from experiments.system import tables
from experiments.system.tables import mean_and_deviation

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"


def published(pattern):
    """Paths of that pattern, of which there must be one."""
    paths = sorted(PUBLISHED.glob(pattern))
    assert paths
    return paths


def check_equal(found, expected):
    """Of rows; another scipy may give other last digits."""
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert list(row) == pytest.approx(list(other))


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "regimes.md").read_text()


def test_penalty_or_radius(page):
    searches, expected = {"digits": 5, "fashion-noise": 3}, []
    for task, count in searches.items():
        folder = PUBLISHED / "radius" / task
        assert len(list(folder.glob("search*"))) == count
        expected += radius.contrasts(task, folder, count)
        for search in range(count):
            runs = tables.read(folder / f"search{search}" / "compare" / "runs.csv", Result)
            sam, crsam, alone = (accuracies(runs, arm) for arm in ("sam", "crsam", radius.NO_PENALTY))
            one, two = (with_interval(*paired(crsam, other, 2)[:3]) for other in (sam, alone))
            assert f"| {np.mean([*sam.values()]):.1f} | {one} | {two} |" in page
            assert {len(sam), len(crsam), len(alone)} == {20}
    check_equal(tables.read(PUBLISHED / "radius" / "contrasts.csv", radius.Contrast), expected)
    primary, penalty = expected[::2], expected[1::2]
    for one, two, p in zip(primary, penalty, radius.holm([row.p for row in primary]), strict=True):
        first, second = (with_interval(row.mean, row.low, row.high) for row in (one, two))
        assert f"**{first}**, p = {p:.2f} | {second} |" in page


def test_the_map(page):
    for path in published("regimes/*/map.csv"):
        task = path.parent.name
        expected = []
        for noise, examples, _ in sorted(regimes.cells(regimes.TASKS[task]), key=lambda cell: cell[:2]):
            runs = path.parent / f"noise{noise:g}-images{examples}" / "compare" / "runs.csv"
            if runs.exists():
                expected += regimes.gains(task, noise, examples, tables.read(runs, Result))
        check_equal(tables.read(path, regimes.Cell), expected)
        for line in (path.parent / "map.md").read_text().splitlines()[2:]:
            assert line in page


def test_the_strong_base(page):
    for path in published("stronger*/accuracies.csv"):
        found = {}
        for row in tables.read(path, stronger.Accuracy):
            found.setdefault(row.task, {}).setdefault(row.arm, {})[row.seed] = row.accuracy
        rows = [row for task, by_arm in found.items() for row in stronger.compared(task, by_arm)]
        check_equal(tables.read(path.with_name("stronger.csv"), stronger.Row), rows)
        for row in rows:
            assert f"{row.accuracy:.1f} ± {row.deviation:.1f}" in page
            if row.arm != "plain base":
                assert with_interval(row.over_plain, row.over_plain_low, row.over_plain_high) in page
            if " sam" in row.arm:
                assert with_interval(row.over_strong, row.over_strong_low, row.over_strong_high) in page
        for kind in ("plain", "strong"):
            for row in tables.read(path.parent / rows[0].task / kind / "runs.csv", Result):
                arm = f"{kind} {row.arm}"
                assert found[rows[0].task][arm][row.seed] == row.test_accuracy


def test_averages_with_averaged_statistics_and_with_their_own(page):
    recipe = recipes.get("digits")  # every recipe has the same labels
    for path in published("*/*/*/averaged-statistics.csv"):
        before, after = (tables.read(file, Result) for file in (path, path.with_name("runs.csv")))
        for arm in dict.fromkeys(row.arm for row in before):
            old, new = ([row.raw_accuracy for row in rows if row.arm == arm] for rows in (before, after))
            assert old == new  # the last weights are the same
            cells = (mean_and_deviation([*accuracies(rows, arm).values()]) for rows in (before, after))
            numbers = " | ".join(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in cells)
            assert f"| {path.parents[1].name} | {arms.label(recipe, arm)} | {numbers} |" in page


def fine_tuned(folder):
    """The lines of a task's table, from the runs of its comparison."""
    runs = tables.read(folder / "compare" / "runs.csv", Result)
    recipe, names = recipes.get("cifar10-finetune"), list(dict.fromkeys(row.arm for row in runs))
    found = {arm: accuracies(runs, arm) for arm in names}
    assert {len(values) for values in found.values()} == {10}
    for arm in names:
        rows = [row for row in runs if row.arm == arm]
        mean, deviation = mean_and_deviation([*found[arm].values()])
        against = [
            "–" if arm == other else with_interval(*paired(found[arm], found[other], DIFFERENCES)[:3])
            for other in ("base", "sam")
        ]
        training, loss, calibration = (
            np.mean([getattr(row, name) for row in rows])
            for name in ("train_accuracy", "test_loss", "calibration_error")
        )
        numbers = f"{training:.1f} | {loss:.2f} | {calibration:.2f}"
        yield f"| {arms.label(recipe, arm)} | {mean:.1f} ± {deviation:.1f} | {' | '.join(against)} | {numbers} |"


DIFFERENCES = 7
"""To one reference, of the protocol's arms; some of them are not run yet."""


def test_fine_tuning(page):
    for path in published("finetune/*/"):
        for line in fine_tuned(path):
            assert line in page
