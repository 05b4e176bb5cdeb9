"""A strong base: what is searched, what is averaged, and which epoch early stopping takes."""

import dataclasses

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.studies import stronger
from experiments.studies.summary import paired
from experiments.system import tables
from experiments.training.logs import EpochRow
from tests.experiments.test_radius import TINY, read

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.slow
def test_a_miniature_of_the_strong_base(tmp_path, monkeypatch):
    monkeypatch.setitem(stronger.TASKS, "digits", dataclasses.replace(TINY, epochs=2))
    options = dict(out=tmp_path, trials=2, trial_seeds=1, seeds=2)
    stronger.stronger(("digits",), **options)
    rows = read(tmp_path / "stronger.csv")
    kinds = [f"strong {m}{a}" for a in (*stronger.AVERAGES, ",stopped") for m in stronger.METHODS]
    assert [row["arm"] for row in rows] == ["plain base", "plain sam", *kinds]
    assert {row["seeds"] for row in rows} == {"2"}
    accuracies = {}
    for row in tables.read(tmp_path / "accuracies.csv", stronger.Accuracy):
        accuracies.setdefault(row.arm, {})[row.seed] = row.accuracy
    assert stronger.compared("digits", accuracies) == tables.read(tmp_path / "stronger.csv", stronger.Row)
    trials = read(tmp_path / "digits" / "tune-strong" / "trials.csv")
    assert len({row["weight_decay"] for row in trials}) == len({row["label_smoothing"] for row in trials}) == 4
    averaged = [row for row in read(tmp_path / "digits" / "strong" / "runs.csv") if "=" in row["arm"]]
    assert any(row["raw_accuracy"] != row["test_accuracy"] for row in averaged)
    # The run that is stopped early is the same on both data sets.
    folders = [tmp_path / "digits" / kind / "base-seed2200" / "metrics.csv" for kind in ("strong", "strong-held-out")]
    losses = [[row["train_loss"] for row in read(path)] for path in folders]
    assert losses[0] == losses[1]
    before = (tmp_path / "stronger.csv").read_bytes()
    stronger.stronger(("digits",), **options)
    assert (tmp_path / "stronger.csv").read_bytes() == before


def test_early_stopping_takes_the_first_best_epoch_on_held_out_data(tmp_path):
    row = EpochRow(1, 1, *[0.0] * 7)
    for name, accuracies in (("held-out", [50, 70, 70, 60]), ("test", [1, 2, 3, 4])):
        rows = [row._replace(epoch=i, step=i, test_accuracy=float(a)) for i, a in enumerate(accuracies, start=1)]
        (tmp_path / name).mkdir()
        tables.append(tmp_path / name / "metrics.csv", rows)
    assert stronger.stopped_early(tmp_path / "held-out", tmp_path / "test") == 2.0


def test_sam_is_compared_with_sgd_that_has_the_same_means(tmp_path):
    values = {"plain base": [50, 60, 70], "strong base,ema=0.99": [60, 65, 73], "strong sam,ema=0.99": [61, 67, 76]}
    found = {arm: dict(enumerate(map(float, row))) for arm, row in values.items()}
    *_, sam = stronger.compared("digits", found)
    assert (sam.over_plain, sam.over_strong) == pytest.approx((8.0, 2.0))
    expected = paired(found["strong sam,ema=0.99"], found["strong base,ema=0.99"])
    assert (sam.over_strong_low, sam.over_strong_high) == pytest.approx((expected.low, expected.high))
    stronger.write_rows([sam], tmp_path)
    assert "| +2.00 (−0.48 to +4.48) |" in (tmp_path / "stronger.md").read_text()


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        stronger.stronger(("digit",))
    with pytest.raises(ValueError, match="Name a task: digits, "):
        stronger.stronger(())
