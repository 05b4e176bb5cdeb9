"""The paper's figures from runs: what is measured, that nothing is measured twice, and the table's arithmetic."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.data.inputs import load, signature_of
from experiments.figures import command, measures
from experiments.figures.command import CURVATURE, RATIO, SURFACE
from experiments.figures.drawings import cells, grid_of, interactive
from experiments.figures.measures import (
    Curvature,
    Ratio,
    SurfacePoint,
    measure_curvature,
    measure_ratio,
    measure_surface,
)
from experiments.figures.snapshots import Snapshot, Trained, find_runs, snapshots
from experiments.settings import recipes
from experiments.settings.configs import Figures, Run
from experiments.system import tables
from experiments.training.checkpoints import Checkpoints
from experiments.training.devices import start
from experiments.training.logs import EpochRow
from experiments.training.program import make_program

pytestmark = pytest.mark.usefixtures("compiled")

TINY = dataclasses.replace(
    recipes.get("digits-convnet"), model="resnet8", model_options={"width": 2}, epochs=2, examples_per_class=10
)
SETTINGS = Figures(surface_points=3)


def metrics(epoch, accuracy):
    return EpochRow(epoch, epoch * 2, 2.0 / epoch, 40.0, 2.1 / epoch, accuracy, 0.1, 1.0, 0.0)


def write_run(folder, recipe):
    """The folder that training would leave: a network that grows by a tenth an epoch."""
    run = folder / f"{recipe.method}-seed{recipe.seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    tables.append(run / "metrics.csv", [metrics(epoch, 50.0 + epoch) for epoch in (1, 2)])
    signature = signature_of(recipe)
    program = make_program(recipe, signature, start(Run(devices=1)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), jax.eval_shape(program.init, 0)
    )
    with contextlib.closing(Checkpoints(run, keep=9)) as checkpoints:
        for epoch in (1, 2):
            params = jax.tree.map(lambda w, epoch=epoch: w * (1 + 0.1 * epoch), state.params)
            step = jnp.asarray(epoch * signature.steps_per_epoch, jnp.int32)
            checkpoints.save(state._replace(step=step, params=params), {})
    return run


def fake_curvature(losses, snapshot, batch, settings, split):
    """Numbers that follow from the parameters, without their cost."""
    size = float(jax.tree.leaves(snapshot.params)[0].ravel()[0])
    return Curvature(*snapshot.key, split, len(batch[1]), *[size + len(split)] * 11)


def fake_ratio(losses, snapshot, batch, settings, batch_size):
    return Ratio(*snapshot.key, len(batch[1]), settings.ratio_rho, 0.9 / snapshot.key[2], 0.1, 0.8, 0.1, 0, 1.0)


def fake_surface(losses, snapshot, batch, settings):
    grid = np.linspace(-1, 1, settings.surface_points)
    return [SurfacePoint(*snapshot.key, float(x), float(y), float(x**2 + 2 * y**2 + 0.1)) for y in grid for x in grid]


@pytest.fixture(scope="module")
def fakes():
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in (("curvature", fake_curvature), ("ratio", fake_ratio), ("surface", fake_surface)):
            patch.setattr(measures, f"measure_{name}", fake)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("crsam", "base"):
        write_run(folder, dataclasses.replace(TINY, method=method))
    return folder


@pytest.fixture(scope="module")
def out(folder, fakes):
    return command.figures("all", folder, SETTINGS)


def test_all_figures_and_numbers_are_written(out):
    for name in ("figure1", "figure2", "figure4", "figure5"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "CR-SAM" in (out / f"{name}.svg").read_text()
    keys = [row[:4] for row in tables.read(out / CURVATURE, Curvature)]
    expected = [(m, 0, e, s) for m in ("base", "crsam") for e in (1, 2) for s in ("train", "test")]
    assert keys == expected
    assert [row[:3] for row in tables.read(out / RATIO, Ratio)] == [key[:3] for key in expected[::2]]
    assert len(tables.read(out / SURFACE, SurfacePoint)) == 2 * 9


def test_each_row_is_measured_on_the_checkpoint_of_its_epoch(out):
    rows = [row for row in tables.read(out / CURVATURE, Curvature) if row[0] == "base" and row.split == "train"]
    assert (rows[1].loss - 5) / (rows[0].loss - 5) == pytest.approx(1.2 / 1.1, rel=1e-4)
    assert {row.examples for row in rows} == {100}  # all there are


def test_nothing_is_measured_twice_and_other_settings_need_another_folder(folder, out):
    before = (out / CURVATURE).read_text()
    command.figures("table3", folder, SETTINGS)
    assert (out / CURVATURE).read_text() == before
    with pytest.raises(FileExistsError, match="other settings"):
        command.figures("table3", folder, dataclasses.replace(SETTINGS, num_probes=3))


@pytest.mark.parametrize("cut", [3, 40])
def test_a_measurement_that_was_cut_off_goes_on(folder, out, cut):
    path = out / CURVATURE
    text = path.read_text()
    path.write_text(text[:-cut])
    command.figures("table3", folder, SETTINGS)
    assert path.read_text() == text


def softmax_losses():
    """A linear classifier, so small that its Hessian can be written down."""

    def each(params, batch, model_state):
        x, y = batch
        return -jnp.take_along_axis(jax.nn.log_softmax(x @ params + model_state), y[:, None], axis=1)[:, 0]

    def mean(params, batch, model_state):
        return each(params, batch, model_state).mean()

    def accuracy(params, batch, model_state):
        x, y = batch
        return 100 * jnp.mean(jnp.argmax(x @ params + model_state, -1) == y)

    return measures.Losses(mean, each, accuracy)


@pytest.fixture
def linear():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 12))
    return (
        softmax_losses(),
        Snapshot(("sam", 3, 5), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.arange(4.0)),
        batch,
    )


def test_the_measures_are_those_of_the_dense_hessian(linear):
    losses, snapshot, batch = linear
    whole = {"batch": batch, "model_state": snapshot.model_state}
    settings = Figures(num_probes=24, num_steps=12, batch_size=8)
    row = measure_curvature(losses, snapshot, batch, settings, "test")
    assert row[:5] == ("sam", 3, 5, "test", 12)
    hessian = np.asarray(jax.hessian(losses.mean)(snapshot.params, **whole)).reshape(12, 12)
    assert row.loss == pytest.approx(float(losses.mean(snapshot.params, **whole)), rel=1e-5)
    assert row.accuracy == pytest.approx(float(losses.accuracy(snapshot.params, **whole)), rel=1e-5)
    gradient = jax.grad(losses.mean)(snapshot.params, **whole)
    assert row.gradient_norm == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-5)
    assert abs(row.trace - np.trace(hessian)) < 5 * row.trace_error
    assert row.normalized_trace == pytest.approx(row.trace / row.gradient_norm, rel=1e-6)
    assert row.top_eigenvalue == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-4)


def test_the_ratio_of_each_training_batch_has_its_own_perturbation(linear):
    losses, snapshot, batch = linear
    settings = Figures(ratio_rho=1e-3)
    row = measure_ratio(losses, snapshot, batch, settings, 4)
    assert row[:5] == ("sam", 3, 5, 12, 1e-3)
    assert row.ratio_of_means == pytest.approx(1, abs=0.02)  # the loss is all but linear that near


def test_the_centre_of_the_surface_is_the_network(linear):
    losses, snapshot, batch = linear
    points = measure_surface(losses, snapshot, batch, Figures(surface_points=3))
    xs, ys, values = grid_of(points, "sam")
    np.testing.assert_array_equal((xs, ys), [[-1, 0, 1]] * 2)
    loss = losses.mean(snapshot.params, batch, snapshot.model_state)
    assert values[1, 1] == pytest.approx(float(loss), rel=1e-5)


def test_the_measured_loss_is_that_of_evaluation_mode(folder):
    run = find_runs(folder)[0]
    dataset, signature = load(run.recipe), signature_of(run.recipe)
    [last] = snapshots(run, signature, [2])
    program = make_program(run.recipe, signature, start(Run(devices=1)))
    images, labels = dataset.train
    total, correct, count, *_ = program.judge.evaluate(
        last.params, last.model_state, (jnp.asarray(images), jnp.asarray(labels)), None
    )
    losses, batch = measures.losses_of(run.recipe, signature), measures.examples(dataset.train, 1000, signature)
    arguments = last.params, batch, last.model_state
    assert float(losses.mean(*arguments)) == pytest.approx(float(total / count), rel=1e-5)
    assert float(losses.accuracy(*arguments)) == pytest.approx(float(100 * correct / count), rel=1e-5)


def test_an_epoch_that_was_not_kept_is_named(folder):
    run = find_runs(folder)[0]
    signature = signature_of(run.recipe)
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
