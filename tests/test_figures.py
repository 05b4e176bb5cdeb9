"""The paper's figures from runs: what is measured, that nothing is measured twice, and the table's arithmetic."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from crsam_jax import curvature
from experiments import recipes
from experiments.checkpoints import Checkpoints
from experiments.configs import Run
from experiments.figures import command, network, tables
from experiments.figures.measure import CURVATURE, RATIO, SURFACE
from experiments.figures.measures import Curvature, Ratio
from experiments.figures.settings import Figures
from experiments.figures.surface_plots import grid_of, interactive
from experiments.figures.surfaces import SurfacePoint
from experiments.figures.table import cells
from experiments.figures.trained import Trained, find_runs, snapshots
from experiments.logs import EpochRow
from experiments.program import make_program
from experiments.scale import start

TINY = dataclasses.replace(
    recipes.get("digits-small-resnet"), model="resnet8", model_options={"width": 4}, epochs=2, examples_per_class=10
)
SETTINGS = Figures(
    train_examples=20, test_examples=20, num_probes=2, num_steps=3, ratio_examples=20, surface_points=3, batch_size=20
)


def metrics(epoch, accuracy):
    return EpochRow(epoch, epoch * 2, 2.0 / epoch, 40.0, 2.1 / epoch, accuracy, 0.1, 1.0, 0.0)


def write_run(folder, recipe):
    """The folder that training would leave, with networks that only differ by their seed and a shift an epoch."""
    run = folder / f"{recipe.method}-seed{recipe.seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    rows = [metrics(epoch, 50.0 + recipe.seed) for epoch in (1, 2)]
    lines = [",".join(EpochRow._fields), *(",".join(map(repr, row)) for row in rows)]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    dataset = network.load(recipe)
    signature = network.signature_of(recipe, dataset)
    state = make_program(recipe, signature, start(Run(devices=1))).init(recipe.seed)
    with contextlib.closing(Checkpoints(run, keep=9)) as checkpoints:
        for epoch in (1, 2):
            params = jax.tree.map(lambda w, epoch=epoch: w * (1 + 0.1 * epoch), state.params)
            step = jnp.asarray(epoch * signature.steps_per_epoch, jnp.int32)
            checkpoints.save(state._replace(step=step, params=params), {})
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("base", "crsam"):
        write_run(folder, dataclasses.replace(TINY, method=method))
    return folder


@pytest.fixture(scope="module")
def out(folder):
    return command.figures("all", folder, SETTINGS)


def test_all_figures_and_numbers_are_written(out):
    for name in ("figure1", "figure2", "figure4", "figure5"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    rows = tables.read(out / CURVATURE, Curvature)
    expected = {(m, 0, e, s) for m in ("base", "crsam") for e in (1, 2) for s in ("train", "test")}
    assert {row[:4] for row in rows} == expected
    assert len(rows) == len(expected)
    assert {row[:3] for row in tables.read(out / RATIO, Ratio)} == {(m, 0, e) for m, _, e, _ in expected}
    assert len(tables.read(out / SURFACE, SurfacePoint)) == 2 * 9


def test_the_numbers_are_those_of_the_checkpoint(folder, out):
    run = find_runs(folder)[0]
    dataset = network.load(run.recipe)
    signature = network.signature_of(run.recipe, dataset)
    [last] = snapshots(run, signature, [2])
    losses = network.losses_of(run.recipe, signature)
    data = {"batch": network.examples(dataset.train, 20, dataset), "model_state": last.model_state}
    [row] = [r for r in tables.read(out / CURVATURE, Curvature) if r[:4] == ("base", 0, 2, "train")]
    assert row.loss == pytest.approx(float(losses.mean(last.params, **data)), rel=1e-5)
    assert row.gradient_norm == pytest.approx(curvature.gradient_norm(losses.mean, last.params, data), rel=1e-4)
    assert row.normalized_trace == pytest.approx(row.trace / row.gradient_norm, rel=1e-5)
    assert row.examples == 20
    xs, ys, surface = grid_of(tables.read(out / SURFACE, SurfacePoint), "base")
    assert surface[1, 1] == pytest.approx(row.loss, rel=1e-4)  # the centre is the network itself
    np.testing.assert_allclose((xs, ys), [[-1, 0, 1]] * 2)


def test_nothing_is_measured_twice_and_other_settings_need_another_folder(folder, out):
    before = (out / CURVATURE).read_text()
    command.figures("table3", folder, SETTINGS)
    assert (out / CURVATURE).read_text() == before
    with pytest.raises(FileExistsError, match="other settings"):
        command.figures("table3", folder, dataclasses.replace(SETTINGS, num_probes=3))


def test_an_interrupted_measurement_goes_on(folder, out):
    before = tables.read(out / CURVATURE, Curvature)
    path = out / CURVATURE
    text = path.read_text()
    path.write_text(text[: text.rstrip("\n").rfind("\n") + 20])  # the last line cut off
    command.figures("table3", folder, SETTINGS)
    after = tables.read(path, Curvature)
    numbers = slice(0, Curvature._fields.index("trace_seconds"))
    assert [row[numbers] for row in after] == [row[numbers] for row in before]


def test_an_epoch_that_was_not_kept_is_named(folder):
    run = find_runs(folder)[0]
    signature = network.signature_of(run.recipe, network.load(run.recipe))
    with pytest.raises(FileNotFoundError, match=r"epochs \[7\]; there are \[1, 2\]"):
        snapshots(run, signature, [1, 7])


def test_runs_that_cannot_be_compared_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no training runs"):
        find_runs(tmp_path)
    for i, recipe in enumerate((TINY, dataclasses.replace(TINY, batch_size=25))):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    with pytest.raises(ValueError, match="differ in batch_size"):
        find_runs(tmp_path)


def curvature_row(seed, epoch, split, trace, norm=2.0):
    return Curvature(
        "sam", seed, epoch, split, 20, 1.0, 90.0 + seed, norm, trace, 0.1, trace / norm, 0.1, 5.0, *[0] * 3
    )


def test_the_table_holds_mean_and_sample_deviation_of_the_last_epoch(tmp_path):
    rows = [curvature_row(s, e, split, 10.0 * s + e) for s in (0, 1, 2) for e in (1, 9) for split in ("train", "test")]
    runs = [
        Trained(tmp_path, dataclasses.replace(TINY, method="sam", seed=s), "SAM", [metrics(1, 0.0), metrics(2, 60 + s)])
        for s in (0, 1, 2)
    ]
    norm, trace, normalized, top, accuracy = cells(rows, runs, "sam", "test")
    assert norm == (2.0, 0.0)
    assert trace == pytest.approx((19.0, 10.0))  # 9, 19, 29
    assert normalized == pytest.approx((9.5, 5.0))
    assert top == (5.0, 0.0)
    assert accuracy == pytest.approx((61.0, 1.0))
    assert str(trace) == "19.00 ± 10.00"
    assert cells(rows, runs, "sam", "train")[-1] == pytest.approx((91.0, 1.0))
    [single] = {str(cell) for cell in cells(rows[:4], runs[:1], "sam", "test")[:1]}
    assert single == "2.00"


def test_the_interactive_page_needs_no_network(out):
    pytest.importorskip("plotly", reason="interactive surfaces need pip install plotly")
    page = interactive(tables.read(out / SURFACE, SurfacePoint), {"base": "SGD", "crsam": "CR-SAM"}, out).read_text()
    assert 'src="http' not in page
    assert "CR-SAM" in page
