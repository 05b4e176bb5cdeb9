"""One device, eight, and two processes train alike; so do a batch in one piece and in several."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tensorboardX", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.data.dataset import Dataset, Split
from experiments.data.inputs import in_memory, open_inputs
from experiments.settings import recipes
from experiments.settings.configs import Run
from experiments.training.devices import start
from experiments.training.program import make_program

RNG = np.random.default_rng(0)
BATCH = 32


def split(examples):
    labels = RNG.integers(0, 10, examples).astype(np.int32)
    images = RNG.integers(0, 128, (examples, 8, 8, 1)) + 12 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


DATA = Dataset("synthetic", split(4 * BATCH), split(50), 10, (0.4,), (0.2,))
RECIPE = dataclasses.replace(
    recipes.get("digits-convnet"), method="sam", augmentation="basic", batch_size=BATCH, model_options={"width": 4}
)  # fmt: skip


@pytest.fixture(autouse=True)
def eight_devices():
    if len(jax.devices()) < 8:
        pytest.skip("jax started with fewer than 8 CPU devices, before tests/conftest.py could ask for them")


def train(devices, steps=6, **changes):
    """Losses of the first steps, and the state after them."""
    recipe = dataclasses.replace(RECIPE, **changes)
    mesh = start(Run(devices=devices))
    inputs = in_memory(recipe, DATA, mesh)
    program = make_program(recipe, inputs.signature, mesh)
    state, losses = program.init(recipe.seed), []
    for step in range(steps):
        state = program.step(state, inputs.feed(step))
        losses.append(float(state.loss))
    return losses, jax.device_get(state)


@pytest.fixture(scope="module")
def alone():
    return train(devices=1)


def assert_close(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)
    jax.tree.map(close, found[1].params, expected[1].params)


def test_eight_devices_train_as_one(alone):
    assert_close(train(devices=8), alone)


def losses_of(devices, params, model_state, images, labels, **changes):
    """Loss, gradient, new model state and right answers of one batch, as the program of a mesh sees it."""
    recipe = dataclasses.replace(RECIPE, **changes)
    mesh = start(Run(devices=devices))
    program = make_program(recipe, in_memory(recipe, DATA, mesh).signature, mesh)
    evaluate = jax.jit(jax.value_and_grad(program.loss_fn, has_aux=True))
    (loss, (model_state, correct)), grads = evaluate(params, model_state, images, labels)
    return loss, grads, model_state, correct


@pytest.mark.parametrize(
    ("changes", "devices", "part"),
    [
        ({"batch_norm": "device"}, 8, lambda x, i: x[4 * i : 4 * i + 4]),
        ({"accumulate": 8}, 1, lambda x, i: x[i::8]),
    ],
)
def test_parts_of_a_batch_have_statistics_of_their_own(changes, devices, part, alone):
    """The loss, its gradient and the statistics to keep are means over the parts."""
    params, model_state = alone[1].params, alone[1].model_state
    images, labels = jnp.asarray(DATA.train.images[:BATCH] / 255, jnp.float32), jnp.asarray(DATA.train.labels[:BATCH])
    found = losses_of(devices, params, model_state, images, labels, **changes)
    each = [losses_of(1, params, model_state, part(images, i), part(labels, i)) for i in range(8)]
    expected = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *(parts[:3] for parts in each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found[:3], expected)
    assert int(found[3]) == sum(int(parts[3]) for parts in each)


@pytest.mark.slow
def test_accumulation_perturbs_for_the_whole_batch():
    """Without BatchNorm, four parts one after the other train as the batch in one piece."""
    vit = {"model": "vit_ti4", "model_options": {"width": 12, "depth": 1}}
    expected, found = (train(devices=1, accumulate=count, **vit) for count in (1, 4))
    assert_close(found, expected)


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"32 cannot be shared equally by 8 devices in 3 part.*--batch-size"):
        open_inputs(dataclasses.replace(RECIPE, accumulate=3), start(Run(devices=8)))
    with pytest.raises(ValueError, match="--devices 99"):
        start(Run(devices=99))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, cache_folder):
    """Two real processes that meet on loopback, and one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    train_ = [sys.executable, "-m", "experiments", "train", "digits-convnet", "--method", "sam", "--epochs", "2"]
    train_ += ["--model-options.width", "4", "--log-steps", "5"]
    processes = [
        launched([*train_, "--out", str(tmp_path / "two"), "--distributed", "--coordinator", coordinator,
               "--num-processes", "2", "--process-id", str(index)], cache_folder)
        for index in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone = launched([*train_, "--out", str(tmp_path / "one")], cache_folder)
    output, _ = alone.communicate(timeout=400)
    assert alone.returncode == 0, output
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(5, 41, 5))
    np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=2e-3)
    assert "2 x cpu" in (tmp_path / "two" / "environment.jsonl").read_text()


def launched(command, cache_folder):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache_folder)}
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
