"""The points of a step shared out among the devices of a mesh axis, together with data parallelism on another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crsam_jax import Execution, crsam, random_probes, sam
from tests.core.problems import flat, mlp

pytestmark = pytest.mark.usefixtures("x64")

SETTINGS = {
    "two sides": (crsam, {}),
    "five points on two places": (crsam, {"probes": random_probes(2)}),
    "one point": (sam, {}),
}


@pytest.fixture
def grid():
    """Eight devices, four parts of the batch by two places for points."""
    if len(jax.devices("cpu")) < 8:
        pytest.skip("jax started with fewer than 8 CPU devices, before tests/conftest.py could ask for them")
    return jax.make_mesh((4, 2), ("data", "probe"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def problem():
    return mlp(examples=64, dtype=jnp.float64)


def step_of(tx, loss_fn):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return tx.update(grads, state, params, batch=batch, loss=loss)

    return step


def on_one_device(name):
    (method, options), (loss_fn, params, batch) = SETTINGS[name], problem()
    tx = method(loss_fn, 0.3, execution=Execution("ordered"), **options)
    return jax.jit(step_of(tx, loss_fn))(params, tx.init(params), batch)


def assert_close(found, expected):
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SETTINGS)
def test_under_jit_it_gives_what_one_device_gives(name, grid):
    (method, options), (loss_fn, params, batch) = SETTINGS[name], problem()
    tx = method(loss_fn, 0.3, execution=Execution(probe_axis="probe"), **options)
    batch = jax.device_put(batch, NamedSharding(grid, P(("data", "probe"))))
    params = jax.device_put(params, NamedSharding(grid, P()))
    with jax.set_mesh(grid):
        found = jax.jit(step_of(tx, loss_fn))(params, tx.init(params), batch)
    assert_close(found, on_one_device(name))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_under_shard_map_it_gives_what_one_device_gives(name, check_vma, grid):
    (method, options), (loss_fn, params, batch) = SETTINGS[name], problem()
    tx = method(loss_fn, 0.3, execution=Execution(axis_name="data", probe_axis="probe"), **options)

    def step(params, state, batch):
        local = jax.lax.pcast(params, "data", to="varying") if check_vma else params
        loss, grads = jax.lax.pmean(jax.value_and_grad(loss_fn)(local, batch), "data")
        return tx.update(grads, state, params, batch=batch, loss=loss)

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    found = jax.jit(jax.shard_map(step, mesh=grid, **specs))(params, tx.init(params), batch)
    assert_close(found, on_one_device(name))


def test_each_device_evaluates_one_side():
    """As many places as points: half of the products of a device that evaluates both."""
    loss_fn, params, batch = problem()
    mesh = jax.make_mesh((2,), ("probe",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    products = {}
    for name, execution in {"shared": Execution(probe_axis="probe"), "alone": Execution("ordered")}.items():
        tx = crsam(loss_fn, 0.3, execution=execution)
        grads = jax.grad(loss_fn)(params, batch)
        update = jax.jit(lambda g, s, p, b, tx=tx: tx.update(g, s, p, batch=b, loss=jnp.zeros(())))
        with jax.set_mesh(mesh):
            text = update.lower(grads, tx.init(params), params, batch).as_text()
        products[name] = text.count("stablehlo.dot_general")
    assert 2 * products["shared"] == products["alone"]


def test_a_mesh_without_the_axis_is_an_error_that_says_what_to_do():
    loss_fn, params, batch = problem()
    tx = crsam(loss_fn, execution=Execution(probe_axis="probe"))
    with pytest.raises(ValueError, match=r"probe_axis='probe' is no axis of the mesh in context.*jax.set_mesh"):
        jax.jit(tx.update)(params, tx.init(params), params, batch=batch)
    with pytest.raises(ValueError, match="axis_name and probe_axis are both 'data'"):
        Execution(axis_name="data", probe_axis="data")
