"""Eight devices give what one gives: under jit, shard_map with and without its check, and pmap."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crsam_jax import Execution, crsam_gradient
from tests.core.problems import MEMBERS, mlp

AXIS = "data"
LOSS_FN, PARAMS, BATCH = mlp(examples=64)
NAMES = ("sam", "crsam")
# The curvature is a second difference: devices that sum in another order change it by a few ε of the loss over ρ².
close = lambda found, expected: chex.assert_trees_all_close(found, expected, rtol=5e-5, atol=5e-5)


def transformation(name, **options):
    return optax.chain(MEMBERS[name](LOSS_FN, rho=0.2, **options), optax.sgd(0.1, momentum=0.9))


def train(tx, grads_of, params, state, batch):
    """Two steps, so that a mistake in the first is seen at another point too."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads_of(params, batch), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=2)[0]


@cache
def on_one_device(name):
    tx = transformation(name)
    return jax.jit(lambda p, s, b: train(tx, jax.grad(LOSS_FN), p, s, b))(PARAMS, tx.init(PARAMS), BATCH)


@pytest.mark.parametrize("name", NAMES)
def test_jit_with_sharded_arrays_needs_nothing(name, mesh):
    tx = transformation(name)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P(AXIS)))
    params, state = jax.device_put((PARAMS, tx.init(PARAMS)), NamedSharding(mesh, P()))
    found = jax.jit(lambda p, s, b: train(tx, jax.grad(LOSS_FN), p, s, b))(params, state, batch)
    close(jax.device_get(found), jax.device_get(on_one_device(name)))


def test_jit_with_params_sharded_over_their_features(mesh):
    tx = transformation("crsam")
    specs = {"first": {"w": P(None, AXIS), "b": P(AXIS)}, "second": {"w": P(AXIS), "b": P()}}
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), PARAMS, specs)
    state, batch = jax.device_put((tx.init(PARAMS), BATCH), NamedSharding(mesh, P()))
    found = jax.jit(lambda p, s, b: train(tx, jax.grad(LOSS_FN), p, s, b))(params, state, batch)
    close(jax.device_get(found), jax.device_get(on_one_device("crsam")))


def averaged_gradient(check_vma):
    """The caller's part of the contract: the gradient averaged over the axis."""

    def grads_of(params, batch):
        if check_vma:  # else the gradient is summed over the axis already
            params = jax.lax.pcast(params, AXIS, to="varying")
        return jax.lax.pmean(jax.grad(LOSS_FN)(params, batch), AXIS)

    return grads_of


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("name", "evaluation"), [("sam", "auto"), ("crsam", "auto"), ("crsam", "ordered"), ("crsam", "vmap")]
)
def test_shard_map_averages_the_probes_over_the_axis(name, check_vma, evaluation, mesh):
    tx = transformation(name, execution=Execution(evaluation, axis_name=AXIS))
    step = jax.shard_map(
        lambda p, s, b: train(tx, averaged_gradient(check_vma), p, s, b),
        mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    found = jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)
    close(jax.device_get(found), jax.device_get(on_one_device(name)))


@pytest.mark.parametrize("name", NAMES)
def test_pmap_averages_the_probes_over_the_axis(name, mesh):
    tx = transformation(name, execution=Execution(axis_name=AXIS))
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCH)
    step = jax.pmap(
        lambda p, s, b: train(tx, averaged_gradient(False), p, s, b),
        axis_name=AXIS, in_axes=(None, None, 0), devices=list(mesh.devices.flat),
    )  # fmt: skip
    found = jax.device_get(step(PARAMS, tx.init(PARAMS), split))
    expected = jax.device_get(on_one_device(name))
    for i in (0, 7):
        close(jax.tree.map(lambda x, i=i: x[i], found), expected)


def test_without_axis_name_each_device_probes_its_own_shard(mesh):
    """So that the tests above would fail if nothing were averaged."""
    tx = transformation("sam")
    step = jax.shard_map(
        lambda p, s, b: jax.tree.map(lambda x: x[None], train(tx, averaged_gradient(False), p, s, b)[0]),
        mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(AXIS), check_vma=False,
    )  # fmt: skip
    weights = np.asarray(jax.jit(step)(PARAMS, tx.init(PARAMS), BATCH)["first"]["w"])
    assert np.abs(weights[0] - weights[1]).max() > 1e-4


def test_pure_function_under_shard_map(mesh):
    gradient_fn = crsam_gradient(LOSS_FN, 0.5, execution=Execution(axis_name=AXIS))
    step = jax.shard_map(
        lambda p, b: gradient_fn(p, averaged_gradient(True)(p, b), batch=b),
        mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(),
    )  # fmt: skip
    close(
        jax.device_get(jax.jit(step)(PARAMS, BATCH)), jax.device_get(crsam_gradient(LOSS_FN, 0.5)(PARAMS, batch=BATCH))
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_aux_and_half_precision_pass_through_shard_map(check_vma, mesh):
    """Losses of a narrower dtype and a dropped aux do not disturb the averaging."""
    loss_fn = lambda params, batch: (LOSS_FN(params, batch).astype(jnp.bfloat16), batch)
    tx = MEMBERS["crsam"](loss_fn, rho=0.2, execution=Execution(axis_name=AXIS), has_aux=True)
    step = jax.shard_map(
        lambda p, b: tx.update(averaged_gradient(check_vma)(p, b), tx.init(p), p, batch=b)[1].diagnostics.loss,
        mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=check_vma,
    )  # fmt: skip
    assert float(jax.jit(step)(PARAMS, BATCH)) == pytest.approx(float(LOSS_FN(PARAMS, BATCH)), rel=1e-2)
