"""The report's sentences, recomputed from its CSV files."""

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.studies import study, summary
from experiments.studies.jobs import Result
from experiments.studies.summary import paired, seeds_needed
from experiments.system import tables

ROOT = Path(__file__).parents[2]
DOCS, STUDY = ROOT / "docs", ROOT / "results" / "published" / "study"
TASKS = ("digits", "cifar10", "cifar10-augmented", "fashion-noise", "fashion-vit")
RIGHT_LABELS = ("cifar10", "cifar10-augmented", "fashion-vit")


def words(page):
    return " ".join((DOCS / page).read_text().split())


@pytest.fixture(scope="module")
def accuracies():
    """Of a task and an arm, by seed."""
    found = {}
    for task in TASKS:
        for row in tables.read(STUDY / task / "runs.csv", Result):
            found.setdefault((task, row.arm), {})[row.seed] = row.test_accuracy
    return found


def trials(task, arm):
    with (STUDY / task / "trials.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["arm"] == arm]


def signed(value):
    return f"{value:+.1f}".replace("-", "−")


def with_interval(difference):
    return summary.with_interval(*difference[:3], digits=1)


def test_no_task_is_fitted():
    found = {}
    for task in TASKS:
        rows = tables.read(STUDY / task / "runs.csv", Result)
        found[task] = np.mean([row.train_accuracy for row in rows if row.arm == "base"])
    text = words("study.md")
    assert all(f"{value:.1f} %" in text for value in found.values())
    assert f"its training accuracy is {min(found.values()):.0f} to {max(found.values()):.0f} %" in text


def test_eleven_intervals_come_to_include_0_for_two_references(accuracies):
    count, marginal = 0, set()
    for task, arm in accuracies:
        for reference in ("sam", "base"):
            if arm == reference or (arm, reference) == ("base", "sam"):
                continue  # SAM against the base is one comparison
            one, two = (paired(accuracies[task, arm], accuracies[task, reference], m) for m in (23, 46))
            if one.low * one.high > 0 >= two.low * two.high:
                count += 1
                marginal |= {(task, arm)} if arm in study.MAIN else set()
    assert count == 11
    assert marginal == {("digits", "base,ema=0.99"), ("fashion-noise", "crsam"), ("cifar10-augmented", "msam")}
    assert "eleven more come to include 0" in words("study.md")


def test_how_many_seeds_half_a_point_takes(accuracies):
    found = {
        task: [
            seeds_needed(paired(accuracies[task, arm], accuracies[task, "base"], 23).deviation, 0.5, 23)
            for arm in study.MAIN[1:]
        ]
        for task in TASKS
    }
    resnets = found["cifar10"] + found["cifar10-augmented"] + found["fashion-noise"]
    ends = [f"{min(counts):,} to {max(counts):,}" for counts in (resnets, found["fashion-vit"], found["digits"])]
    text = words("study.md")
    assert "need {} seeds with the ResNets, {} with the ViT, and {} on digits".format(*ends) in text
    assert f"take {min(found['cifar10'])} to {max(found['cifar10'])} seeds" in text


def test_what_the_search_found_for_sgd_on_wrong_labels():
    rows = sorted(trials("fashion-noise", "base"), key=lambda row: float(row["learning_rate"]))
    found = [float(row["accuracy"]) for row in rows]
    assert int(np.argmax(found)) == 1  # the second lowest rate
    assert rows[1]["learning_rate"] == "0.00669"
    assert f"{max(found) - found[-1]:.1f}, {max(found) - min(found):.1f}" == "0.4, 6.5"
    text = words("study.md")
    assert "the second lowest of its learning rates" in text
    assert "up to 6.5 points" in text


def test_which_settings_are_at_the_ends_of_their_ranges():
    def place(task, arm, key):
        rows = trials(task, arm)
        best = max(rows, key=lambda row: float(row["accuracy"]))
        return sorted(float(row[key]) for row in rows).index(float(best[key]))

    smallest = [(task, "sam", "sam.rho") for task in RIGHT_LABELS]
    smallest += [("fashion-vit", arm, key) for arm, key in (
        ("sam-late", "sam.rho"), ("asam", "asam.rho"), ("msam", "msam.rho"), ("s2sam", "s2sam.rho"))]  # fmt: skip
    assert {place(*one) for one in smallest} == {0}
    largest = [("fashion-noise", "base,ema=0.99", "learning_rate")]
    largest += [("fashion-vit", "crsam-late", key) for key in ("learning_rate", "crsam.alpha")]
    assert {place(*one) for one in largest} == {15}
    arms = {"cifar10": ("base", "base,ema=0.99", "sam", "crsam"), "cifar10-augmented": ("sam",)}
    arms["fashion-vit"] = ("base", "base,ema=0.99", "sam", "asam", "sam-late", "msam", "s2sam")
    assert {place(task, arm, "learning_rate") for task in arms for arm in arms[task]} == {14}
    radii = [("digits", "sam", "sam.rho"), ("cifar10", "crsam-late", "crsam.rho")]
    radii += [("fashion-noise", "sam-late", "sam.rho"), ("fashion-noise", "crsam-late", "crsam.rho")]
    assert {place(*one) for one in radii} == {14}


ROWS = {
    "`msam(base, rho)`": "msam", "`late(sam": "sam-late", "`adaptive_policy(sam": "ae-sam", "| `sam` |": "sam",
    "for twice the epochs": "base-2x", "| `crsam` |": "crsam",
    "SAM at CR-SAM's radius and learning rate": "crsam,crsam.alpha=0,crsam.beta=0",
}  # fmt: skip


@pytest.mark.parametrize("start", ROWS)
def test_the_table_for_choosing_a_method(accuracies, start):
    page = (DOCS / "explanation" / "choosing.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("|") and start in line)
    difference = {task: paired(accuracies[task, ROWS[start]], accuracies[task, "base"], 23) for task in TASKS}
    assert f"| {with_interval(difference['digits'])} | {with_interval(difference['fashion-noise'])} |" in line
    right = sorted(difference[task].mean for task in RIGHT_LABELS)
    if start == "for twice the epochs":
        assert f"{signed(right[1])} and {signed(right[2])} with crops and flips, {signed(right[0])} (undecided)" in line
    else:
        assert f"{signed(right[0])} to {signed(right[2])}" in line
    if "undecided |" in line:  # for both references
        both = [paired(accuracies[task, ROWS[start]], accuracies[task, "base"], 46) for task in RIGHT_LABELS]
        assert all(one.low < 0 < one.high for one in both)


def test_what_the_penalty_adds_at_equal_radius(accuracies):
    found = {
        task: paired(accuracies[task, "crsam"], accuracies[task, "crsam,crsam.alpha=0,crsam.beta=0"], 23)
        for task in TASKS
    }
    text = words("explanation/choosing.md")
    assert f"{found['digits'].mean:.1f} points on digits ({signed(found['digits'].low)} to" in text
    fashion = found["fashion-noise"]
    assert f"{signed(fashion.mean)} on Fashion-MNIST ({signed(fashion.low)} to {signed(fashion.high)})" in text
    assert all(one.low < 0 < one.high for task, one in found.items() if task != "digits")


@pytest.mark.parametrize(("task", "seeds"), [("digits", 20), ("fashion-noise", 9)])
def test_sam_and_crsam_at_one_radius(task, seeds):
    rows = tables.read(STUDY / "supplement" / f"{task}-radius" / "runs.csv", Result)
    arms = {"digits": ("sam", next(row.arm for row in rows if row.arm != "sam"))}.get(
        task, ("crsam,crsam.alpha=0,crsam.beta=0", "crsam")
    )
    sam, crsam = ({row.seed: row.test_accuracy for row in rows if row.arm == arm} for arm in arms)
    difference = paired(crsam, sam)
    text = f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})".replace("-", "−")
    assert f"{text} to SAM" in words("study.md")
    assert difference.pairs == seeds
    if task == "fashion-noise":
        interval = f"{signed(difference.low)} to {signed(difference.high)}"
        assert f"{signed(difference.mean)}, {interval} with nine other seeds" in words("explanation/choosing.md")


def test_the_network_that_fits():
    rows = tables.read(STUDY / "cifar10-5000" / "runs.csv", Result)
    runs = {arm: [row for row in rows if row.arm == arm] for arm in ("base", "sam", "crsam")}
    assert {len(one) for one in runs.values()} == {5}
    assert {row.train_accuracy for row in runs["base"]} == {100.0}
    by_seed = {arm: {row.seed: row.test_accuracy for row in one} for arm, one in runs.items()}
    text = words("regimes.md")
    for arm, reference in (("sam", "base"), ("crsam", "base"), ("crsam", "sam")):
        one = paired(by_seed[arm], by_seed[reference], 2)
        assert f"{one.mean:+.2f} ({one.low:+.2f} to {one.high:+.2f})".replace("-", "−") in text
    for one in runs.values():
        for field, digits in (("test_accuracy", 1), ("train_accuracy", 1), ("test_loss", 2)):
            mean, deviation = tables.mean_and_deviation([getattr(row, field) for row in one])
            assert f"{mean:.{digits}f} ± {deviation:.{digits}f}" in text
    gain = paired(by_seed["sam"], by_seed["base"], 2)
    for page in ("study.md", "explanation/choosing.md", "../README.md"):
        assert f"({signed(gain.low)} to {signed(gain.high)})" in words(page)
