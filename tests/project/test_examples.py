"""The scripts in examples/: each one runs, resumes, and its first update is the method's."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

for package in ("flax", "matplotlib", "orbax.checkpoint", "sklearn"):
    pytest.importorskip(package, reason="needs pip install crsam_jax[experiments]")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SHORT = {
    "train_resnet": "--width 4 --steps 2 --every 1",
    "train_vit": "--width 8 --layers 1 --heads 2 --steps 2 --every 1",
    "train_language_model": "--width 16 --layers 1 --heads 2 --context 8 --batch 8 --steps 2 --every 1 --sample 5",
    "fine_tune": "--width 16 --pretraining_steps 2 --steps 2 --every 1",
}
VISION_TRANSFORMER = "--width 8 --layers 1 --heads 2 --batch 32 --clip 1e9"
LANGUAGE_MODEL = "--width 16 --layers 2 --heads 2 --context 8 --batch 8 --rho 0.3 --clip 1e9"


def module(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def mesh(size):
    return jax.set_mesh(jax.make_mesh((size,), ("data",), devices=jax.devices()[:size]))


def vector(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def crsam_gradient(loss_fn, params, s, perturbed=1.0):
    """CR-SAM by its formula, on one vector: g⁺ + α (g⁺ + g⁻ − 2g)/(1 + S) + β (g⁺ − g⁻)/(1 + D)."""
    w, tree = ravel_pytree(jax.tree.map(np.asarray, params))
    value_and_grad = jax.jit(jax.value_and_grad(lambda w: loss_fn(tree(w))))
    loss, g = value_and_grad(w)
    step = s.rho * g * perturbed / jnp.linalg.norm(g * perturbed)
    (loss_plus, g_plus), (loss_minus, g_minus) = value_and_grad(w + step), value_and_grad(w - step)
    bend = s.alpha * (g_plus + g_minus - 2 * g) / (1 + loss_plus + loss_minus - 2 * loss)
    return g_plus + bend + s.beta * (g_plus - g_minus) / (1 + loss_plus - loss_minus)


def assert_same(found, expected, plain):
    """Equal to rounding, where the plain gradient is not."""
    size = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) < 1e-3 * size
    assert np.linalg.norm(found - plain) > 3e-3 * size


def adam_gradient(opt_state):
    """Adam's mean of gradients after one step holds a tenth of the gradient."""
    return 10 * vector(optax.tree.get(opt_state, "mu"))


def test_every_example_is_tested():
    assert sorted(SHORT) == NAMES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "fine_tune" else []) for name in NAMES]
)
def test_it_runs_and_resumes(name, tmp_path, capsys, compiled):
    example = module(name)
    arguments = f"{SHORT[name]} --out {tmp_path}".split()
    example.main(arguments)
    first = capsys.readouterr().out
    assert re.search(r"step 2, \d+ s: loss \d+\.\d+", first)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    example.main([*arguments, "--steps", "3"])
    second = capsys.readouterr().out
    assert "step 2" in second.partition("step 3, ")[0].replace("step 2, 0 s", "")
    assert "step 1, " not in second


@pytest.mark.parametrize("devices", [1, 4])
def test_first_update_of_the_resnet(devices, compiled):
    example = module("train_resnet")
    s = example.options(["--width", "4", "--dtype", "float32", "--batch", "32"])
    with mesh(devices):
        train_set, _ = example.load("digits")
        state, loss_fn, train_step, _ = example.build(s, 1, 10)
        x, y = example.batch_of_step(s, *train_set, 0)
        params, stats, x_, y_ = jax.tree.map(np.asarray, (state[0], state[1], x, y))
        (_, _, opt_state), loss = train_step(state, x, y)
        trace = vector(optax.tree.get(opt_state, "trace"))
    params, stats, x_, y_ = jax.tree.map(jnp.asarray, (params, stats, x_, y_))
    plain_loss = lambda w: loss_fn(w, stats, x_, y_)[0]
    expected = np.asarray(crsam_gradient(plain_loss, params, s)) + s.weight_decay * vector(params)
    np.testing.assert_allclose(loss, plain_loss(params), rtol=1e-5)
    assert_same(trace, expected, vector(jax.grad(plain_loss)(params)) + s.weight_decay * vector(params))


def test_first_update_of_the_vision_transformer(compiled):
    example = module("train_vit")
    s = example.options(VISION_TRANSFORMER.split())
    train_set, _ = example.load("digits")
    state, loss_fn, train_step = example.build(s, train_set[0], 10)
    batch = example.batch_of_step(s, *train_set, 0)
    plain_loss = lambda w: loss_fn(w, **batch)
    new, _ = train_step(state, batch)
    expected = crsam_gradient(plain_loss, state.params, s)
    assert_same(adam_gradient(new.opt_state), np.asarray(expected), vector(jax.grad(plain_loss)(state.params)))


@pytest.mark.parametrize("devices", [1, 4])
def test_first_update_of_the_language_model(devices, compiled):
    example = module("train_language_model")
    s = example.options(LANGUAGE_MODEL.split())
    characters, text, _ = example.load("help")
    key = jax.random.key(7)
    with mesh(devices):
        state, _, train_step, _ = example.build(s, len(characters))
        assert all("data" in leaf.sharding.spec for leaf in jax.tree.leaves(state[0]))
        tokens = example.batch_of_step(s, text, 0)
        params = jax.tree.map(np.asarray, state[0])
        (_, opt_state), _ = train_step(state, tokens, key)
        mean = adam_gradient(opt_state)
    with mesh(1):  # the reference knows nothing of devices
        _, loss_fn, _, _ = example.build(s, len(characters))
        plain_loss = lambda w: loss_fn(w, jnp.asarray(np.asarray(tokens)), key)
        expected = crsam_gradient(plain_loss, params, s)
        assert_same(mean, np.asarray(expected), vector(jax.grad(plain_loss)(jax.tree.map(jnp.asarray, params))))


@pytest.mark.parametrize("perturbed", ["adapters", "all"])
def test_first_update_of_the_fine_tuning(perturbed, compiled):
    nnx = pytest.importorskip("flax.nnx")
    example = module("fine_tune")
    s = example.options(["--width", "16", "--perturbed", perturbed])
    network = example.Network(s.width, s.rank, nnx.Rngs(0))
    (params, opt_state), frozen, loss_fn, train_step, _ = example.build(s, network, example.is_adapter_or_output, True)
    batch = example.batch_of_step(s, *example.load(s)[1][0], 0)
    new, opt_state, _ = train_step(params, opt_state, frozen, batch)
    mask = jax.tree.map_with_path(
        lambda path, leaf: np.full(leaf.shape, perturbed == "all" or "lora" in jax.tree_util.keystr(path)), params
    )
    plain_loss = lambda w: loss_fn(w, frozen, **batch)
    expected = crsam_gradient(plain_loss, params, s, vector(mask))
    assert_same(adam_gradient(opt_state), np.asarray(expected), vector(jax.grad(plain_loss)(params)))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert 0 < vector(mask).sum() <= vector(params).size


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_a_command(name, tmp_path):
    """The whole default run. What it reaches is in examples/README.md."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if name == "train_language_model":
        assert float(re.findall(r"validation loss (\S+)", run.stdout)[-1]) < 2.2
        assert "--- sample" in run.stdout
    else:
        assert float(re.findall(r"test accuracy (\S+)", run.stdout)[-1]) > (0.75 if name == "fine_tune" else 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_stands_alone(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 200
    assert "experiments" not in re.sub(r'""".*?"""', "", source, flags=re.DOTALL)
    assert source.count("CR-SAM:") >= 4  # the marks of the lines that differ


def test_the_table_has_every_example():
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"]({name}.py)" in table and f"python examples/{name}.py" in table for name in NAMES)
