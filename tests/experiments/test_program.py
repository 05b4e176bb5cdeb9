"""The compiled step: what it shares, what it averages, how it chooses, and how calibration is counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("sklearn", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.data.dataset import Split
from experiments.data.inputs import in_memory, load, open_inputs
from experiments.networks.augment import normalize
from experiments.settings import ranges, recipes
from experiments.settings.configs import Run
from experiments.settings.overrides import changed
from experiments.settings.recipes import Recipe
from experiments.studies import arms
from experiments.training import devices, judge
from experiments.training.judge import evaluate
from experiments.training.program import STATISTICS_EXAMPLES, averaged, averaged_network, make_program

pytestmark = pytest.mark.usefixtures("compiled")

RECIPE = dataclasses.replace(
    recipes.get("digits"), epochs=2, batch_size=32, examples_per_class=7, model_options={"width": 4}
)  # fmt: skip


def opened(recipe):
    mesh = devices.start(Run(devices=1))
    inputs = open_inputs(recipe, mesh)
    return inputs, make_program(recipe, inputs.signature, mesh)


def states(recipe, steps=4):
    """The state after each step."""
    inputs, made = opened(recipe)
    state, found = made.init(recipe.seed), []
    for step in range(steps):
        state = made.step(state, inputs.feed(step))
        found.append(jax.device_get(state))
    return found


def test_numbers_seeds_and_labels_share_one_compilation():
    numbers = {
        "learning_rate": 0.2, "weight_decay": 0.1, "momentum": 0.5, "crsam.rho": 0.3, "crsam.alpha": 0.2,
        "crsam.beta": 0.3, "crsam.offset": 0.5, "label_noise": 0.1, "seed": 7,
    }  # fmt: skip
    first = dataclasses.replace(RECIPE, method="crsam", per_method={})
    second = changed(first, numbers)
    _, one = opened(first)
    before = one.step._cache_size()
    ends = states(first, 1)[0].params, states(second, 1)[0].params
    _, other = opened(second)
    assert other.step is one.step
    assert one.step._cache_size() == before + 1
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, *ends)))


def test_traced_numbers_train_as_constant_ones(monkeypatch):
    recipe = arms.resolve(RECIPE, "crsam", {}, 0)
    traced = states(recipe)[-1]
    monkeypatch.setattr(Recipe, "numbers", {})
    constant = states(recipe)[-1]
    assert not constant.numbers
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, traced.params, constant.params)


@pytest.mark.parametrize(("name", "value"), [("learning_rate", "x"), ("crsam.rho", -1.0), ("ema", 1.0)])
def test_a_number_out_of_range_is_refused_though_it_is_traced(name, value):
    with pytest.raises(ValueError, match=name.split(".")[-1]):
        opened(changed(dataclasses.replace(RECIPE, method="crsam"), {name: value}))


def test_the_average_is_weighted_by_powers_of_the_decay():
    found = states(dataclasses.replace(RECIPE, ema=0.8))
    params, model_state = averaged(jax.tree.map(jnp.asarray, found[-1]))
    weights = 0.8 ** np.arange(len(found))[::-1]
    for average, tree in ((params, [s.params for s in found]), (model_state, [s.model_state for s in found])):
        expected = jax.tree.map(lambda *x: np.tensordot(weights / weights.sum(), np.stack(x), 1), *tree)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), average, expected)
    with pytest.raises(ValueError, match="--ema"):
        averaged(states(RECIPE, 1)[0])


def test_swa_is_the_mean_of_the_last_steps():
    recipe = dataclasses.replace(RECIPE, epochs=1, swa_start=0.5)
    inputs, _ = opened(recipe)
    total = inputs.signature.steps_per_epoch
    found = states(recipe, total)
    first = round(0.5 * total)
    for step in (0, first - 1, first, total - 1):
        params, model_state = averaged(jax.tree.map(jnp.asarray, found[step]))
        counted = found[min(first, step) : step + 1]
        for average, trees in ((params, [s.params for s in counted]), (model_state, [s.model_state for s in counted])):
            expected = jax.tree.map(lambda *x: np.mean(np.stack(x), 0), *trees)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), average, expected)
    with pytest.raises(ValueError, match="--ema and --swa-start are two averages"):
        ranges.check(dataclasses.replace(recipe, ema=0.9))


@pytest.mark.parametrize("model", ["convnet", "resnet8", "vit_ti4"])
def test_statistics_measured_anew_are_those_of_the_batch(model):
    """With them the network does in evaluation mode what it does in training mode; the ViT has none."""
    options = {"width": 4} if model != "vit_ti4" else {"width": 12, "depth": 1}
    inputs, made = opened(dataclasses.replace(RECIPE, method="base", model=model, model_options=options))
    state, (images, labels) = made.init(0), inputs.examples(60)
    normalized = normalize(images, inputs.signature.mean, inputs.signature.std)
    in_training, _ = made.loss_fn(state.params, state.model_state, normalized, labels)
    anew = made.judge.remeasured(state.params, state.model_state, (images, labels))
    found = made.judge.loss(state.params, anew, (images, labels))
    np.testing.assert_allclose(found, in_training, rtol=1e-5)
    if model != "vit_ti4":
        assert abs(made.judge.loss(state.params, state.model_state, (images, labels)) / in_training - 1) > 1e-3


def test_averaged_weights_have_statistics_of_their_own():
    recipe = dataclasses.replace(RECIPE, ema=0.8)
    inputs, made = opened(recipe)
    last = jax.tree.map(jnp.asarray, states(recipe)[-1])
    params, model_state = averaged_network(last, made, inputs)
    mean, mean_state = averaged(last)
    jax.tree.map(np.testing.assert_array_equal, params, mean)
    examples = inputs.examples(STATISTICS_EXAMPLES)
    jax.tree.map(np.testing.assert_array_equal, model_state, made.judge.remeasured(mean, mean_state, examples))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, model_state, mean_state)))
    without = inputs._replace(examples=lambda count: None)
    jax.tree.map(np.testing.assert_array_equal, averaged_network(last, made, without)[1], mean_state)


def test_examples_come_from_all_classes_though_the_split_is_sorted():
    dataset = load(RECIPE)
    order = np.argsort(dataset.train.labels, kind="stable")
    ordered = dataset._replace(train=Split(*(array[order] for array in dataset.train)))
    _, labels = in_memory(RECIPE, ordered, devices.start(Run(devices=1))).examples(30)
    assert len(labels) == 30
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_label_smoothing_spreads_a_share_of_each_label_over_all_classes(accumulate):
    """In the loss of every point; its number is an input of the compiled step."""
    recipe = dataclasses.replace(RECIPE, label_smoothing=0.3, accumulate=accumulate)
    inputs, made = opened(recipe)
    state, (images, labels, order) = made.init(0), inputs.feed(0)
    images, labels = normalize(images[order[0]], inputs.signature.mean, inputs.signature.std), labels[order[0]]
    loss, _ = made.loss_fn(state.params, state.model_state, images, labels, state.numbers["label_smoothing"])
    plain, (_, right) = made.loss_fn(state.params, state.model_state, images, labels)
    over_all = [made.loss_fn(state.params, state.model_state, images, jnp.full_like(labels, k))[0] for k in range(10)]
    np.testing.assert_allclose(loss, 0.7 * plain + 0.3 * np.mean(over_all), rtol=1e-5)
    assert opened(dataclasses.replace(recipe, label_smoothing=0.1))[1].step is made.step
    after = made.step(state, inputs.feed(0))
    np.testing.assert_allclose(after.loss, loss, rtol=1e-4)
    assert after.correct == right


def test_the_calibration_error_is_that_of_the_bins():
    """Against numpy, bin by bin; padding does not count."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (200, 10)), rng.integers(0, 10, 200)
    labels[150:] = -1
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = shares.max(1)[:150], (logits.argmax(1) == labels)[:150]
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (low <= confidence) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    made = judge.Judge(lambda p, s, batch, classes: judge._sums(*batch), probe=None, loss=None, remeasured=None)
    batches = [(jnp.asarray(logits[i : i + 100]), jnp.asarray(labels[i : i + 100])) for i in (0, 100)]
    found = evaluate(made, None, None, iter(batches))
    losses = -np.log(shares[np.arange(150), labels[:150]])
    assert found == pytest.approx((losses.mean(), 100 * right.mean(), error), rel=1e-4)


def test_the_probe_is_the_gradient_and_its_curvature():
    inputs, made = opened(RECIPE)
    state, batch = made.init(0), inputs.examples(20)
    loss = lambda params: made.judge.loss(params, state.model_state, batch)
    gradient = jax.grad(loss)(state.params)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    v = jax.tree.map(lambda g: g / norm, gradient)
    plus, minus = (loss(jax.tree.map(lambda w, v: w + rho * v, state.params, v)) for rho in (0.05, -0.05))
    curvature = (plus + minus - 2 * loss(state.params)) / 0.05**2
    found = made.judge.probe(state.params, state.model_state, batch)
    assert [float(x) for x in found] == pytest.approx([float(norm), float(curvature)], rel=0.01)


def test_the_average_of_a_shifted_method_is_of_the_weights_without_the_shift():
    recipe = dataclasses.replace(RECIPE, method="msam", ema=0.8, per_method={})
    found, (_, made) = states(recipe), opened(recipe)
    weights = [made.weights(jax.tree.map(jnp.asarray, state)) for state in found]
    share = 0.8 ** np.arange(len(found))[::-1]
    expected = jax.tree.map(lambda *x: np.tensordot(share / share.sum(), np.stack(x), 1), *weights)
    average, _ = averaged(jax.tree.map(jnp.asarray, found[-1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), average, expected)
    distance = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), weights[-1], found[-1].params)
    assert np.sqrt(sum(jax.tree.leaves(distance))) == pytest.approx(recipe.msam.rho, rel=1e-4)


def test_the_ascent_on_a_quarter_is_that_of_every_fourth_example():
    recipe = arms.resolve(RECIPE, "sam-quarter", {}, 0)
    inputs, made = opened(recipe)
    state = made.init(recipe.seed)
    images, labels, order = inputs.feed(0)
    signature = inputs.signature
    batch = normalize(images[order[0]], signature.mean, signature.std), labels[order[0]]
    gradient = jax.grad(lambda params, *batch: made.loss_fn(params, state.model_state, *batch)[0])
    ascent = gradient(state.params, *(x[::4] for x in batch))
    scale = recipe.sam.rho / optax.tree.norm(ascent)
    expected = gradient(optax.tree.add_scale(state.params, scale, ascent), *batch)
    expected = optax.tree.add_scale(expected, recipe.weight_decay, state.params)
    rate = float(made.schedule(0))
    stepped = jax.tree.map(lambda p, g: np.asarray(p - rate * g), state.params, expected)
    after = made.step(state, inputs.feed(0)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, stepped)


def test_a_batch_that_has_no_quarter_is_refused():
    with pytest.raises(ValueError, match="sam-quarter takes a part"):
        opened(dataclasses.replace(RECIPE, method="sam-quarter", batch_size=30))
