"""A miniature of the study, and the grids of settings: every arm of the protocol, tuned and compared in one call."""

import dataclasses

import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.settings.overrides import find
from experiments.studies import sensitivity, study
from experiments.studies.jobs import Result
from experiments.studies.sensitivity import Axis, Grid
from experiments.system import tables

pytestmark = pytest.mark.usefixtures("compiled")

TINY = dataclasses.replace(
    recipes.get("digits"), epochs=2, batch_size=32, examples_per_class=7, test_examples_per_class=5,
    model_options={"width": 4}, per_method={},
)  # fmt: skip


@pytest.mark.slow
def test_a_miniature_of_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.TASKS, "digits", study.Task(TINY, trial_seeds=2, seeds=2))
    folder = study.study("digits", out=tmp_path, trials=2)
    arms = study.MAIN + study.SECONDARY
    rows = tables.read(folder / "runs.csv", Result)
    assert sorted((row.arm, row.seed) for row in rows) == sorted((arm, seed) for arm in arms for seed in (0, 1))
    trials = tables.read(tmp_path / "tune" / "runs.csv", Result)
    assert {row.seed for row in trials} == {100, 101}
    assert {row.arm for row in trials} == set(study.MAIN)
    tuned = find(str(tmp_path / "tune" / "digits-tuned.json"))
    assert set(tuned.per_method) == set(study.MAIN)
    settings = {row.arm: row.settings for row in rows}
    found = settings["crsam"]  # the secondary arms take what was found for their parents
    assert settings["crsam-linear"] == settings["crsam-eq7"] == found
    assert settings["gsam"] == settings["sam"] == settings["sam-1.5x"]
    assert {row.epochs for row in rows if row.arm == "base-3x"} == {6}
    table = (folder / "table.md").read_text()
    assert "| against SAM |" in table
    assert "| against SGD |" in table
    assert (folder / "cost.png").stat().st_size > 10_000
    before = (folder / "runs.csv").read_text()
    study.study("digits", out=tmp_path, trials=2)  # everything is complete, and read
    assert (folder / "runs.csv").read_text() == before


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="cifar10"):
        study.study("cifar")


def test_every_point_of_the_grids_is_trained_with_its_settings(tmp_path, monkeypatch):
    rho, alpha = Axis("crsam.rho", "ρ", (0.1, 0.2)), Axis("crsam.alpha", "α", (0.3,))
    monkeypatch.setattr(sensitivity, "GRIDS", (Grid("logarithms", rho, alpha),))
    run = Run(out=tmp_path, keep=None, log_steps=0, probe_examples=0, evaluate_every=9)
    folder = sensitivity.sensitivity("digits", TINY, seeds=2, processes=1, run=run)
    found = {(row.settings.split()[1], row.settings.split()[2]) for row in tables.read(folder / "runs.csv", Result)}
    assert found == {("crsam.rho=0.1", "crsam.alpha=0.3"), ("crsam.rho=0.2", "crsam.alpha=0.3")}
    assert (folder / "sensitivity.png").stat().st_size > 10_000
