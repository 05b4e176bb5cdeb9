"""Variants of SAM against formulas in NumPy's float64: one step, and several where there is a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import ascents
from tests.core.problems import flat, matrix_products, mlp, one_step

pytestmark = pytest.mark.usefixtures("x64")

RHO = 0.2
SCALES = np.array([1.0, 3.0, 0.5])
W = np.array([1.0, -2.0, 0.5])


def loss_fn(w):
    return jnp.sum(SCALES * w**4) / 4


def gradient(w):
    return SCALES * np.asarray(w) ** 3


def unit(x):
    return x / np.linalg.norm(x)


def test_stable_sam_has_the_length_of_g():
    plus = gradient(W + RHO * unit(gradient(W)))
    found, seen = one_step(crsam_jax.stable_sam(loss_fn, RHO), loss_fn, W)
    np.testing.assert_allclose(found, np.linalg.norm(gradient(W)) * unit(plus), rtol=1e-12)
    assert seen.guarded_steps == seen.mismatched_steps == 0


@pytest.mark.parametrize(("sigma", "max_rho"), [(0.5, 10.0), (0.5, 0.01)])
def test_le_sam_raises_the_loss_by_sigma_or_stops_at_the_largest_radius(sigma, max_rho):
    g = gradient(W)
    rho = min(sigma / np.linalg.norm(g), max_rho)
    found, seen = one_step(crsam_jax.le_sam(loss_fn, sigma, max_rho), loss_fn, W)
    np.testing.assert_allclose(found, gradient(W + rho * unit(g)), rtol=1e-12)
    assert seen.curvature == pytest.approx(float(unit(g) @ (found - g) / rho), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_multi_step_sam_walks(steps):
    point = np.asarray(W)
    for _ in range(steps):
        point = point + RHO / steps * unit(gradient(point))
    found, _ = one_step(crsam_jax.multi_step_sam(loss_fn, RHO, steps), loss_fn, W)
    np.testing.assert_allclose(found, gradient(point), rtol=1e-12)


def test_multi_step_sam_is_optaxs():
    """`optax.contrib.sam` with two ascent steps of ρ/2, transparent mode: the third update is the descent."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO / 2))
    theirs = optax.contrib.sam(optax.sgd(1.0), ascent, sync_period=3)
    w, state = W, theirs.init(W)
    for _ in range(3):
        updates, state = theirs.update(jax.grad(loss_fn)(w), state, w)
        w = optax.apply_updates(w, updates)
    found, _ = one_step(crsam_jax.multi_step_sam(loss_fn, RHO, 2), loss_fn, W)
    np.testing.assert_allclose(found, W - w, rtol=1e-10)


def test_rwp_mixes_the_gradient_at_random_weights():
    noise, _ = ascents.random_weight_ascent(0.1, seed=3).apply(W, jnp.zeros((), jnp.int32), W)
    assert np.linalg.norm(noise) > 0
    found, _ = one_step(crsam_jax.rwp(loss_fn, 0.1, 0.25, seed=3), loss_fn, W)
    np.testing.assert_allclose(found, 0.25 * gradient(W) + 0.75 * gradient(W + noise), rtol=1e-12)


def test_the_noise_of_rwp_is_relative_to_each_filter_and_new_in_each_step():
    params = {"kernel": jnp.ones((400, 2)) * jnp.array([1.0, 5.0]), "bias": jnp.full(400, 2.0)}
    ascent = ascents.random_weight_ascent(0.1)
    noise, state = ascent.apply(params, ascent.init(params), params)
    np.testing.assert_allclose(np.std(noise["kernel"], axis=0), [0.1, 0.5], rtol=0.15)
    np.testing.assert_allclose(np.std(noise["bias"]), 0.2, rtol=0.15)
    again, _ = ascent.apply(params, state, params)
    assert np.all(flat(again) != flat(noise))


def steps_of(ascent, gradients):
    state, directions = ascent.init(W), []
    for g in gradients:
        direction, state = jax.jit(ascent.apply)(g, state, W)
        directions.append(direction)
    return np.stack(directions)


GRADIENTS = np.random.default_rng(0).normal(size=(5, 3))


def test_variance_suppressed_directions():
    d, expected = np.zeros(3), []
    for g in GRADIENTS:
        d = 0.6 * d + 0.4 * g
        expected.append(unit(d))
    np.testing.assert_allclose(steps_of(ascents.variance_suppressed_ascent(0.4), GRADIENTS), expected, rtol=1e-10)
    plain = steps_of(ascents.variance_suppressed_ascent(1.0), GRADIENTS)
    np.testing.assert_allclose(plain, [unit(g) for g in GRADIENTS], rtol=1e-10)


def test_preconditioned_directions_are_those_of_adams_second_moment():
    adam, expected = optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-3), []
    state = adam.init(W)
    for g in GRADIENTS:
        scaled, state = adam.update(jnp.asarray(g), state)
        expected.append(unit(np.asarray(scaled)))
    np.testing.assert_allclose(steps_of(ascents.preconditioned_ascent(0.9, 1e-3), GRADIENTS), expected, rtol=1e-10)


def test_a_gradient_that_is_not_finite_leaves_the_memory_alone():
    broken = GRADIENTS.copy()
    broken[2] = np.nan
    for ascent in (ascents.variance_suppressed_ascent(), ascents.preconditioned_ascent()):
        found = steps_of(ascent, broken)
        assert np.all(np.isfinite(found[3:]))


# Functional-SAM


def network_fn(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def criterion_fn(outputs, y):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * y, axis=-1))


def network():
    keys = jax.random.split(jax.random.key(1), 5)
    params = {
        "a": jax.random.normal(keys[0], (4, 5)),
        "b": jax.random.normal(keys[1], (5,)),
        "c": jax.random.normal(keys[2], (5, 3)),
    }
    x, y = jax.random.normal(keys[3], (6, 4)), jax.nn.one_hot(jax.random.randint(keys[4], (6,), 0, 3), 3)
    return params, x, y


def whole_loss(params, x, y):
    return criterion_fn(network_fn(params, x), y)


@pytest.mark.parametrize("jit", [False, True])
def test_functional_sam_is_the_jacobian_there_times_the_slope_here(jit):
    params, x, y = network()
    loss, g = jax.value_and_grad(whole_loss)(params, x, y)
    there = jax.tree.map(lambda w, d: w + RHO * d / np.linalg.norm(flat(g)), params, g)
    jacobian = jax.jacrev(network_fn)(there, x)
    slope = jax.grad(criterion_fn)(network_fn(params, x), y)
    expected = jax.tree.map(lambda j: np.tensordot(slope, j, axes=2), jacobian)
    tx = crsam_jax.functional_sam(network_fn, criterion_fn, RHO)
    update = jax.jit(tx.update) if jit else tx.update
    found, state = update(g, tx.init(params), params, loss=loss, x=x, y=y)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)
    assert state.diagnostics.mismatched_steps == state.diagnostics.guarded_steps == 0


def test_functional_sam_of_a_linear_criterion_is_sam_and_of_a_linear_network_the_gradient():
    params, x, y = network()
    linear = lambda outputs, y: jnp.sum(outputs * y)
    loss_fn = lambda params, x, y: linear(network_fn(params, x), y)
    found, _ = one_step(crsam_jax.functional_sam(network_fn, linear, RHO), loss_fn, params, x=x, y=y)
    expected, _ = one_step(crsam_jax.sam(loss_fn, RHO), loss_fn, params, x=x, y=y)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)
    square = lambda w, x: x @ w
    half = lambda outputs, y: jnp.sum((outputs - y) ** 2)
    w, y = jnp.ones(4), jnp.zeros(6)
    found, _ = one_step(crsam_jax.functional_sam(square, half, RHO), lambda w, x, y: half(square(w, x), y), w, x=x, y=y)
    np.testing.assert_allclose(found, jax.grad(lambda w: half(square(w, x), y))(w), rtol=1e-10)


def test_functional_sam_costs_two_evaluations():
    params, x, y = network()

    dots = lambda step: matrix_products(jax.jit(step).lower(params, x, y).compile())

    tx = crsam_jax.functional_sam(network_fn, criterion_fn, RHO)

    def step(params, x, y):
        loss, g = jax.value_and_grad(whole_loss)(params, x, y)
        return tx.update(g, tx.init(params), params, loss=loss, x=x, y=y)[0]

    assert dots(step) == 2 * dots(jax.value_and_grad(whole_loss))


def test_functional_sam_on_an_explicit_mesh():
    params, x, y = network()
    tx = crsam_jax.functional_sam(network_fn, criterion_fn, RHO)

    def step(params, x, y):
        loss, g = jax.value_and_grad(whole_loss)(params, x, y)
        return tx.update(g, tx.init(params), params, loss=loss, x=x, y=y)[0]

    expected = jax.jit(step)(params, x, y)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = jax.device_put((x, y), jax.P("data"))
        np.testing.assert_allclose(flat(jax.jit(step)(params, *batch)), flat(expected), rtol=1e-12)


def test_functional_sam_names_a_missing_argument():
    params, x, _ = network()
    tx = crsam_jax.functional_sam(network_fn, criterion_fn, RHO)
    with pytest.raises(TypeError, match="needs 'y'"):
        tx.update(params, tx.init(params), params, x=x)


@pytest.mark.parametrize("method", ["stable_sam", "le_sam", "multi_step_sam", "rwp"])
def test_variants_take_part_in_everything(method):
    """A mask, a policy, scan, m-sharpness."""
    mlp_loss, params, batch = mlp(dtype=jnp.float64)
    make = getattr(crsam_jax, method)
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(crsam_jax.periodic(make(mlp_loss, mask=mask), 2), optax.sgd(0.05))

    def step(carry, _):
        params, state = carry
        loss, g = jax.value_and_grad(mlp_loss)(params, batch)
        updates, state = tx.update(g, state, params, loss=loss, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=20))()
    assert losses[-1] < losses[0]
    execution = crsam_jax.Execution(axis_name="parts", sync_perturbation=False)
    local = make(mlp_loss, execution=execution)
    parts = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)
    part = lambda b: local.update(jax.grad(mlp_loss)(params, b), local.init(params), params, batch=b)[0]
    each = jax.vmap(part, axis_name="parts")(parts)
    assert np.all(np.isfinite(flat(each)))
