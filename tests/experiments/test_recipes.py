"""Recipes: the paper's figures, round trips, names; readiness; comparisons of runs."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.costs import readiness
from experiments.data.inputs import load
from experiments.networks.network import parameter_count
from experiments.settings import overrides, recipes
from experiments.settings.recipes import CrSam, Recipe, Sam
from experiments.training import optimizers, run_folder
from experiments.training.logs import EpochRow, Log, read_epochs, read_steps

ROOT = Path(__file__).parents[2]
PAPER = ROOT.parent / "shared" / "reference" / "paper_hyperparameters.csv"
needs_paper = pytest.mark.skipif(not PAPER.exists(), reason="no ../shared/reference/paper_hyperparameters.csv")


def alike(name):
    return name.lower().replace("-", "").replace("/", "")


@needs_paper
def test_every_row_of_the_paper_is_a_recipe():
    with PAPER.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(recipes.PAPER)
    for row in rows:
        names = [name for name in recipes.PAPER if name.replace("-", "") == alike(row["dataset"] + row["model"])]
        recipe = recipes.get(*names)
        assert recipe.dataset == row["dataset"].replace("imagenet", "imagenet2012")
        assert recipe.model.replace("_", "") == alike(row["model"])
        assert (recipe.epochs, recipe.batch_size) == (int(row["epochs"]), int(row["batch_size"]))
        assert recipe.augmentation == row["augmentation"].lower()
        assert recipe.learning_rate == float(row["peak_learning_rate"])
        assert recipe.weight_decay == float(row["weight_decay"])
        assert recipe.optimizer == {"SGD+M": "sgd", "AdamW": "adamw"}[row["base_optimizer"]]
        assert recipe.sam == Sam(float(row["sam_rho"]))
        assert recipe.crsam == CrSam(float(row["crsam_rho"]), float(row["alpha"]), float(row["beta"]), "linear")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_survives_its_file(name, tmp_path):
    run_folder.save_config(recipes.get(name), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["epochs"] == recipes.get(name).epochs
    found = overrides.find(str(tmp_path / "config.json"))
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(recipes.get(name)))
    run_folder.check_free(found, tmp_path)


def test_misspelt_names_suggest_the_right_one():
    with pytest.raises(ValueError, match="did you mean 'cifar100-resnet18'"):
        recipes.get("cifar100-resnet_18")
    with pytest.raises(ValueError, match="did you mean 'crsam'"):
        optimizers.method_of(dataclasses.replace(recipes.get("digits-convnet"), method="crsan"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits-convet"], "did you mean 'digits-convnet'"),
        (["train", "digits-convnet", "--lerning-rate", "1"], "--learning-rate"),
    ],
)
def test_the_command_line_suggests_too(arguments, message):
    found = subprocess.run([sys.executable, "-m", "experiments", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode != 0
    assert message in found.stdout + found.stderr


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe("digits", "convnet", 10, 100, 0.5, 0.0, warmup_epochs=2.0)
    schedule = optimizers.learning_rate(recipe, steps_per_epoch=10)
    rates = np.array([schedule(step) for step in range(101)])
    np.testing.assert_allclose(rates[:21], np.linspace(0, 0.5, 21), atol=1e-7)
    np.testing.assert_allclose(rates[20:], 0.25 * (1 + np.cos(np.pi * np.arange(81) / 80)), atol=1e-7)
    with pytest.raises(ValueError, match="does not fit"):
        optimizers.learning_rate(dataclasses.replace(recipe, warmup_epochs=10.0), 10)


@pytest.mark.parametrize("method", ["base", "sam", "crsam"])
def test_the_base_optimizer_is_pytorchs(method):
    """Decay enters SGD's momentum; at ρ = 0 all methods are their base."""
    recipe = Recipe(
        "digits", "convnet", 2, 100, 0.5, 0.1, method=method, sam=Sam(0.0), crsam=CrSam(0.0, 0.0, 0.0)
    )  # fmt: skip
    loss_fn = lambda w, scale: (scale * w**2 / 2, None)
    tx = optimizers.optimizer(recipe, loss_fn, steps_per_epoch=50)
    w, velocity = jax.numpy.asarray(3.0), 0.0
    expected, state = 3.0, tx.init(w)
    for step in range(4):
        updates, state = tx.update(2.0 * w, state, w, scale=2.0)
        w = optax.apply_updates(w, updates)
        velocity = 0.9 * velocity + 2.0 * expected + 0.1 * expected
        expected -= 0.25 * (1 + np.cos(np.pi * step / 100)) * velocity
    assert float(w) == pytest.approx(expected, rel=1e-5)


def test_subset_noise_and_validation_split():
    recipe = dataclasses.replace(
        recipes.get("digits-convnet"), validation_fraction=0.2, evaluate_on="validation", examples_per_class=50,
        label_noise=0.3,
    )  # fmt: skip
    data, clean = load(recipe), load(dataclasses.replace(recipe, label_noise=0.0))
    assert np.bincount(clean.train.labels).tolist() == [50] * 10
    assert np.sum(data.train.labels != clean.train.labels) == 150
    assert len(data.test.labels) == pytest.approx(200, abs=5)
    rows = {image.tobytes() for image in data.train.images}
    assert sum(image.tobytes() in rows for image in data.test.images) == 0


def test_a_log_drops_what_lies_after_the_checkpoint(tmp_path):
    rows = [EpochRow(epoch, 10 * epoch, 1.0, 50.0, 1 / 3, 50.0, 0.1, 100.0, 0.0) for epoch in (1, 2, 3)]
    with Log(tmp_path, 0) as log:
        for row in rows:
            log.step(row.step, {"loss": 1 / 3})
            log.epoch(row)
    for name in ("metrics.csv", "steps.jsonl"):  # as if cut off while the last row was written
        path = tmp_path / name
        path.write_text(path.read_text()[:-9])
    with Log(tmp_path, 10) as log:
        log.epoch(rows[1])
    assert read_epochs(tmp_path / "metrics.csv") == rows[:2]
    assert read_steps(tmp_path / "steps.jsonl") == [{"step": 10, "loss": 1 / 3}]


def test_one_writer_at_a_time(tmp_path):
    with (
        run_folder.locked(tmp_path),
        pytest.raises(FileExistsError, match="Another process"),
        run_folder.locked(tmp_path),
    ):
        pass
    with run_folder.locked(tmp_path):
        pass


@pytest.mark.parametrize("setting", ["strategy", "penalty"])
def test_the_settings_of_crsam_reach_it(setting):
    recipe = dataclasses.replace(
        recipes.get("digits-convnet"), method="crsam", crsam=recipes.CrSam(**{setting: "unheard"})
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{setting} must be one of"):
        optimizers.optimizer(recipe, lambda params: (0.0, None), 1)


def test_readiness_counts_what_closed_forms_count():
    """One linear layer over patches dominates: FLOPs of a product of matrices, 2 a weight and use."""
    recipe = dataclasses.replace(
        recipes.get("fashion-small-vit"), batch_size=16, model_options={"depth": 1, "width": 192, "patch_size": 7}
    )  # fmt: skip
    base, sam, crsam = readiness.estimates("vit", recipe)
    tokens, weights = 17, 12 * 192**2
    attention = 2 * 2 * tokens**2 * 192
    assert base.flops == pytest.approx(3 * 16 * (2 * tokens * weights + attention), rel=0.15)
    assert (sam.flops - base.flops) * 2 == pytest.approx(crsam.flops - base.flops)
    assert sam.flops == pytest.approx(2 * base.flops, rel=0.05)
    assert base.steps == recipe.epochs * (3000 // 16)
    assert base._replace(flops=3.6e12, steps=1000).hours(1.0) == pytest.approx(1.0)


def test_readiness_counts_parameters_and_memory():
    memory = {}
    recipe = recipes.get("digits-convnet")
    [base] = readiness.estimates("digits", recipe, memory, methods=["base"])
    from flax import nnx

    from experiments.networks.convnet import ConvNet

    parameters = parameter_count(ConvNet(1, 10, 16, rngs=nnx.Rngs(0)))
    assert base.parameters == parameters
    assert base.state_bytes >= 2 * 4 * parameters  # with momentum
    assert base.temporary_bytes > 50 * 64 * 16 * 4  # at least one activation of the first layer
    assert list(memory.values()) == [base.memory]
    [same] = readiness.estimates("rate", dataclasses.replace(recipe, learning_rate=1.0), memory, methods=["base"])
    assert len(memory) == 1  # not compiled again
    [small] = readiness.estimates("batch", dataclasses.replace(recipe, batch_size=10), memory, methods=["base"])
    assert same.temporary_bytes == base.temporary_bytes > small.temporary_bytes


def test_the_papers_rows_train_the_penalty_of_the_released_code():
    assert {recipe.crsam.penalty for recipe in recipes.PAPER.values()} == {"linear"}
    assert {recipe.crsam.penalty for recipe in recipes.REDUCED.values()} == {"log"}
