"""`sharpened`: the value of the loss, the gradient of the optax stage."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import sharpened
from tests.core.problems import flat, matrix_products

METHODS = {
    "sam": (crsam_jax.sam, dict(rho=0.3)),
    "asam": (crsam_jax.asam, dict(rho=0.3)),
    "gsam": (crsam_jax.gsam, dict(rho=0.3)),
    "wsam": (crsam_jax.wsam, dict(rho=0.3)),
    "gradient_norm_penalty": (crsam_jax.gradient_norm_penalty, dict(rho=0.3)),
    "crsam": (crsam_jax.crsam, dict(rho=0.3, alpha=0.2, beta=0.1)),
    "crsam, linear": (crsam_jax.crsam, dict(rho=0.3, alpha=0.2, beta=0.1, penalty="linear")),
    "sam, masked": (crsam_jax.sam, dict(rho=0.3, mask={"a": True, "b": False})),
}


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def with_aux(params, x, y):
    return loss_fn(params, x, y), {"step": jnp.int32(3), "mean": jnp.mean(x)}


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 2))}
    return params, jax.random.normal(keys[2], (8, 4)), jax.random.normal(keys[3], (8, 2))


def by_stage(method, settings, params, x, y):
    tx = method(loss_fn, **settings)
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    return loss, tx.update(grads, tx.init(params), params, loss=loss, x=x, y=y)[0]


def products(fn, problem):
    """How many matrix products the compiled program has."""
    return len(re.findall(r" dot\(", jax.jit(fn).lower(*problem).compile().as_text()))


def assert_equal(found, expected, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_are_those_of_the_stage(name, problem):
    method, settings = METHODS[name]
    sharp = sharpened(loss_fn, method, **settings)
    expected = by_stage(method, settings, *problem)
    assert_equal(jax.value_and_grad(sharp)(*problem), expected)
    assert_equal(jax.jit(jax.value_and_grad(sharp))(*problem), expected)
    assert_equal(jax.value_and_grad(jax.jit(sharp))(*problem), expected)


def test_aux_keywords_and_another_argnum(problem):
    params, x, y = problem
    _, expected = by_stage(crsam_jax.crsam, {}, *problem)
    (loss, aux), grads = jax.value_and_grad(sharpened(with_aux, has_aux=True), has_aux=True)(params, x, y=y)
    assert_equal((loss, grads), (loss_fn(*problem), expected))
    assert aux["step"] == 3
    swapped = sharpened(lambda x, params, y: loss_fn(params, x, y), argnums=1)
    assert_equal(jax.grad(swapped, argnums=1)(x, params, y), expected)


def test_a_traced_radius_scale_and_penalty(problem):
    _, expected = by_stage(crsam_jax.sam, dict(rho=0.2), *problem)

    @jax.jit
    def gradient(params, x, y, rho):
        sharp = jax.jit(sharpened(loss_fn, crsam_jax.sam, rho=rho))
        return jax.grad(lambda w: 8.0 * sharp(w, x, y) + 0.5 * jnp.sum(w["a"] ** 2))(params)

    found = gradient(*problem, jnp.float32(0.2))
    params = problem[0]
    assert_equal(found, {"a": 8 * expected["a"] + params["a"], "b": 8 * expected["b"]})


def test_a_sum_over_micro_batches_gives_each_its_own_perturbation(problem):
    params, x, y = problem
    sharp = sharpened(loss_fn, crsam_jax.crsam, rho=0.3)
    parts = x.reshape(2, 4, 4), y.reshape(2, 4, 2)

    def total(params):
        return jax.lax.scan(lambda sum_, part: (sum_ + sharp(params, *part), None), 0.0, parts)[0] / 2

    halves = [by_stage(crsam_jax.crsam, dict(rho=0.3), params, x[i : i + 4], y[i : i + 4])[1] for i in (0, 4)]
    assert_equal(jax.grad(total)(params), jax.tree.map(lambda a, b: (a + b) / 2, *halves))


def test_other_arguments_have_the_plain_gradient_and_forward_mode_agrees(problem):
    params, x, y = problem
    sharp = sharpened(loss_fn, crsam_jax.sam, rho=0.3)
    assert_equal(jax.grad(sharp, argnums=1)(*problem), jax.grad(loss_fn, argnums=1)(*problem))
    ones = jax.tree.map(jnp.ones_like, params)
    _, change = jax.jvp(lambda w: sharp(w, x, y), (params,), (ones,))
    expected = sum(jnp.sum(g) for g in jax.tree.leaves(jax.grad(sharp)(*problem)))
    np.testing.assert_allclose(change, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_it_costs_what_the_stage_costs(name, problem):
    method, settings = METHODS[name]

    sharp = sharpened(loss_fn, method, **settings)
    expected = products(functools.partial(by_stage, method, settings), problem)
    assert products(jax.value_and_grad(sharp), problem) == expected > 0
    assert products(sharp, problem) == products(loss_fn, problem)


def test_what_it_cannot_do_is_said(problem):
    with pytest.raises(TypeError, match="differentiated once"):
        jax.hessian(sharpened(loss_fn, crsam_jax.sam))(*problem)
    with pytest.raises(TypeError, match=r"rho=schedule\(step\)"):
        sharpened(loss_fn, rho=optax.constant_schedule(0.1))
    with pytest.raises(TypeError, match="constructor"):
        sharpened(loss_fn, crsam_jax.sam(loss_fn))
    with pytest.raises(ValueError, match="stage of the optimizer"):
        jax.grad(sharpened(loss_fn, crsam_jax.rsam))(*problem)
    with pytest.raises(ValueError, match="stage of the optimizer"):
        jax.grad(sharpened(loss_fn, crsam_jax.sam, ascent=crsam_jax.ascents.friendly_ascent()))(*problem)
    with pytest.raises(ValueError, match="stage of the optimizer"):
        jax.grad(sharpened(loss_fn, probes=crsam_jax.random_probes()))(*problem)


def test_a_penalty_from_the_aux_has_its_plain_gradient():
    fn = lambda w: (0.5 * jnp.sum(w**2), (jnp.sum(w**2), jnp.int32(2), jnp.ones(3)))
    sharp = sharpened(fn, crsam_jax.sam, has_aux=True, rho=0.5)

    def total(w):
        loss, (penalty, _, _) = sharp(w)
        return loss + 0.1 * penalty

    w = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(jax.grad(total)(w), [3.3 + 0.6, 4.4 + 0.8], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(w), [3.9, 5.2], rtol=1e-6)


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_an_aux_costs_nothing_more(name, problem):
    method, settings = METHODS[name]

    def aux_of_the_network(params, x, y):
        hidden = jnp.tanh(x @ params["a"]) @ params["b"]
        return jnp.mean((hidden - y) ** 2), {"logits": hidden, "count": jnp.int32(1)}

    sharp = sharpened(aux_of_the_network, method, has_aux=True, **settings)
    found = products(jax.value_and_grad(sharp, has_aux=True), problem)
    assert found == products(functools.partial(by_stage, method, settings), problem) > 0


def test_inside_shard_map_each_device_has_its_own_perturbation(problem):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    params, x, y = problem
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharp = sharpened(loss_fn, crsam_jax.crsam, rho=0.3)
    halves = [by_stage(crsam_jax.crsam, dict(rho=0.3), params, x[i : i + 4], y[i : i + 4])[1] for i in (0, 4)]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(whole, spec, spec), out_specs=whole)
    def mean_gradient(params, x, y):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        return jax.lax.pmean(jax.grad(sharp)(params, x, y), "data")

    assert_equal(mean_gradient(params, x, y), expected)


@pytest.mark.parametrize("method", [crsam_jax.sam, crsam_jax.crsam])
def test_params_in_several_arguments_have_one_perturbation(method):
    def loss_fn(a, x, b):
        return jnp.mean((jnp.tanh(x @ a) @ b) ** 2)

    a, b, x = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(0.5, 1, 6).reshape(3, 2), jnp.eye(4)
    sharp = crsam_jax.sharpened(loss_fn, method, argnums=(0, 2), rho=0.3)
    found = jax.jit(jax.grad(sharp, argnums=(0, 2)))(a, x, b)
    whole = lambda params: loss_fn(params[0], x, params[1])
    tx = method(whole, rho=0.3)
    expected, _ = tx.update(jax.grad(whole)((a, b)), tx.init((a, b)), (a, b))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_aux_of_any_kind_comes_back():
    def loss_fn(w):
        return jnp.sum(w**2), {"name": "first", "scale": 2.0, "logits": 3 * w, "apply": jnp.tanh}

    w = jnp.array([3.0, 4.0])
    sharp = crsam_jax.sharpened(loss_fn, crsam_jax.sam, has_aux=True, rho=0.5)
    for (loss, aux), _ in (jax.value_and_grad(sharp, has_aux=True)(w), (sharp(w), None)):
        assert loss == 25
        assert (aux["name"], aux["scale"], aux["apply"]) == ("first", 2.0, jnp.tanh)
        np.testing.assert_array_equal(aux["logits"], 3 * w)


@pytest.mark.parametrize("argnums", [True, -1, 1.5, (), (0, "a"), "0"])
def test_positions_that_are_none_are_refused(argnums):
    with pytest.raises(TypeError, match="argnums must be the position"):
        crsam_jax.sharpened(jnp.sum, crsam_jax.sam, argnums=argnums)


def convolution_loss(params, images):
    hidden = jax.nn.relu(jax.lax.conv_general_dilated(images, params["first"], (1, 1), "SAME"))
    hidden = jax.nn.relu(jax.lax.conv_general_dilated(hidden, params["second"], (1, 1), "SAME"))
    return jnp.mean(jnp.mean(hidden, axis=(2, 3)) @ params["out"] ** 2)


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_it_has_the_convolutions_of_the_stage(name):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (4, 3, 3, 3)),
        "second": jax.random.normal(keys[1], (4, 4, 3, 3)),
        "out": jax.random.normal(keys[2], (4,)),
    }
    images = jax.random.normal(keys[3], (2, 3, 8, 8))
    method = getattr(crsam_jax, name)

    def stage(params, images):
        loss, grads = jax.value_and_grad(convolution_loss)(params, images)
        tx = method(convolution_loss)
        return loss, tx.update(grads, tx.init(params), params, loss=loss, images=images)[0]

    def convolutions(step):
        text = jax.jit(step).lower(params, images).compile().as_text()
        return text.count("convolution(") + text.count("__onednn$convolution")

    sharp = jax.value_and_grad(crsam_jax.sharpened(convolution_loss, method))
    assert convolutions(sharp) == convolutions(stage) > 0


def test_inside_pmap_each_device_has_its_own_perturbation():
    def loss_fn(w, x):
        return jnp.mean((x @ w) ** 4)

    devices = jax.local_device_count()
    w, x = jnp.array([1.0, -2.0]), jax.random.normal(jax.random.key(0), (devices, 3, 2))
    sharp = crsam_jax.sharpened(loss_fn, crsam_jax.sam, rho=0.1)
    step = lambda w, x: jax.lax.pmean(jax.grad(sharp)(w, x), "devices")
    found = jax.pmap(step, axis_name="devices", in_axes=(None, 0))(w, x)
    expected = jnp.mean(jnp.stack([jax.grad(sharp)(w, part) for part in x]), axis=0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_a_method_is_applied_once():
    loss_fn = lambda w: jnp.sum(w**2)
    sharp = crsam_jax.sharpened(loss_fn, crsam_jax.sam, rho=0.1)
    wrapped = functools.wraps(sharp)(lambda w: sharp(w))
    for loss in (sharp, jax.jit(sharp), wrapped):
        with pytest.raises(TypeError, match="sharpened loss: its gradient is a method's already"):
            crsam_jax.sharpened(loss, crsam_jax.crsam, rho=0.1)
        with pytest.raises(TypeError, match="Give the original loss"):
            crsam_jax.sam(loss, rho=0.1)
        stage, w = crsam_jax.sam(rho=0.1), jnp.ones(3)
        with pytest.raises(TypeError, match="Give the original loss"):
            stage.update(w, stage.init(w), w, value_fn=loss)


def test_functional_sam_takes_its_network_and_criterion_in_the_step():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (3, 5)), "b": jax.random.normal(keys[1], (5, 2))}
    x, y = jax.random.normal(keys[2], (8, 3)), jax.random.normal(keys[3], (8, 2))
    network = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    criterion = lambda outputs, y: jnp.mean((outputs - y) ** 2)

    def through_the_loss(params, x, y, rho):
        functional = lambda _, rho: crsam_jax.functional_sam(
            lambda params: network(params, x), lambda outputs: criterion(outputs, y), rho
        )
        loss_fn = sharpened(lambda params: criterion(network(params, x), y), functional, rho=rho)
        return jax.value_and_grad(loss_fn)(params)

    def through_the_stage(params, x, y, rho):
        tx = crsam_jax.functional_sam(network, criterion, rho)
        loss, grads = jax.value_and_grad(lambda params: criterion(network(params, x), y))(params)
        return loss, tx.update(grads, tx.init(params), params, loss=loss, x=x, y=y)[0]

    found, expected = (jax.jit(way)(params, x, y, 0.1) for way in (through_the_loss, through_the_stage))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    programs = [jax.jit(way).lower(params, x, y, 0.1).compile() for way in (through_the_loss, through_the_stage)]
    assert matrix_products(programs[0]) == matrix_products(programs[1])
    plain = jax.grad(lambda params: criterion(network(params, x), y))(params)
    assert np.abs(flat(found[1]) - flat(plain)).max() > 1e-3


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_convolutions_inside_shard_map_with_the_batch_as_an_argument(kind):
    """They check that all of their operands vary along the same axes, zeros for the batch's tangent included."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")

    def loss_fn(w, x):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.mean(jnp.tanh(y) ** 2)

    sharp = sharpened(loss_fn, crsam_jax.crsam, rho=0.1)
    w, x = jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), jax.random.normal(jax.random.key(1), (4, 8, 8, 2))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))

    def step(w, x):
        loss, gradient = jax.value_and_grad(sharp)(jax.lax.pcast(w, ("data",), to="varying"), x)
        return jax.lax.pmean(loss, "data"), jax.lax.pmean(gradient, "data")

    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        specs = dict(in_specs=(jax.P(), jax.P("data")), out_specs=(jax.P(), jax.P()))
        loss, gradient = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(w, split)
        loss, gradient = np.asarray(loss), np.asarray(gradient)
    parts = [jax.value_and_grad(sharp)(w, part) for part in (x[:2], x[2:])]
    np.testing.assert_allclose(loss, np.mean([float(part[0]) for part in parts]), rtol=1e-5)
    np.testing.assert_allclose(gradient, (parts[0][1] + parts[1][1]) / 2, rtol=1e-4, atol=1e-6)
