"""Local perturbations of parts of the batch, and global ones, on eight devices and on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from crsam_jax import Execution, adaptive_policy, crsam, decoupled_wsam, gsam, look, periodic, random_probes, rsam, sam
from crsam_jax.ascents import dropped_ascent, dynamic_sparse_ascent, friendly_ascent
from tests.core.problems import flat, recording

pytestmark = pytest.mark.usefixtures("x64")

AXIS, PARTS, ETA = "data", 8, 0.1
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
RNG = np.random.default_rng(0)
W = RNG.normal(size=5)
BATCH = RNG.normal(size=(32, 5))
SPLIT = BATCH.reshape(PARTS, -1, 5)

# Makers of members, to be called with the options of the axis; the other evaluations are those of test_sharding.py.
crsam = partial(crsam, rho=0.5)
MEMBERS = {
    "sam": partial(sam, rho=0.5),
    "crsam": crsam,
    "rsam": partial(rsam, rho=0.5, sigma=0.2),
    "friendly": partial(sam, rho=0.5, ascent=friendly_ascent(decay=0.5)),
    "dropped": partial(sam, rho=0.5, ascent=dropped_ascent()),
    "random probes": partial(crsam, probes=random_probes()),
}


def loss_fn(w, batch):
    return jnp.mean(jnp.log1p(jnp.exp(3 * batch @ w)) + jnp.sin(batch @ w))


@jax.jit
def grad_fn(params, batch):
    return jax.grad(loss_fn)(params, batch)


def gradient_of(params, batch, check_vma, is_averaged):
    """The caller's part of the contract: ∇L of the part, averaged over the axis for a global perturbation."""
    if check_vma:
        params = jax.lax.pcast(params, AXIS, to="varying")
    grads = jax.grad(loss_fn)(params, batch)
    return jax.lax.pmean(grads, AXIS) if is_averaged else grads


def on_mesh(tx, mesh, check_vma, is_averaged, steps=2):
    """Params, gradients and states after each step under ``shard_map``; replicated, which ``check_vma`` verifies."""

    def step(params, state, batch):
        g = gradient_of(params, batch, check_vma, is_averaged)
        return tx.update(g, state, params, batch=batch)

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(), check_vma=check_vma)
    return trained(jax.jit(step), tx, steps)


def on_one_device(tx, is_averaged, steps=2):
    """The same by ``vmap`` over the parts, with a named axis."""

    def step(params, state, batch):
        def part(batch):
            return tx.update(gradient_of(params, batch, False, is_averaged), state, params, batch=batch)

        parts = jax.vmap(part, axis_name=AXIS)(batch.reshape(PARTS, -1, 5))
        return jax.tree.map(lambda x: x[0], parts)

    return trained(jax.jit(step), tx, steps)


def trained(step, tx, steps):
    params, state, outs = jnp.asarray(W), tx.init(jnp.asarray(W)), []
    for _ in range(steps):
        updates, state = step(params, state, jnp.asarray(BATCH))
        params = params - ETA * updates
        outs.append(updates)
    return np.array(outs), jax.device_get(state)


def together(leaves):
    """The mean over the parts; a step counts if it does for any part."""
    return max(leaves) if jnp.issubdtype(leaves[0].dtype, jnp.integer) else sum(leaves) / PARTS


def looped(make, steps=2):
    """Each part alone, without an axis, and the mean over the parts; the ascents' memories see the mean gradient."""
    tx, params, outs = make(loss_fn), jnp.asarray(W), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        grads = [grad_fn(params, part) for part in SPLIT]
        results = [update(g, state, params, batch=part) for g, part in zip(grads, SPLIT, strict=True)]
        _, whole = update(sum(grads) / PARTS, state, params, batch=SPLIT[0])  # for its memory alone
        seen = jax.tree.map(lambda *leaves: together(leaves), *[s.diagnostics for _, s in results])
        state = whole._replace(diagnostics=seen)
        outs.append(sum(result for result, _ in results) / PARTS)
        params = params - ETA * outs[-1]
    return np.array(outs), state


@pytest.mark.parametrize("name", MEMBERS)
def test_local_perturbations_are_a_loop_over_the_parts(name, mesh):
    make = MEMBERS[name]
    outs, state = looped(make)
    tx = make(loss_fn, execution=Execution(axis_name=AXIS, sync_perturbation=False))
    runs = [on_mesh(tx, mesh, True, False)]
    if name in ("sam", "random probes"):
        runs += [on_mesh(tx, mesh, False, False), on_one_device(tx, False)]
    for found, found_state in runs:
        close(found, outs)
        close(flat(found_state), flat(state))


@pytest.mark.parametrize("name", ["rsam", "random probes"])  # others: test_sharding.py
def test_global_perturbations_are_those_of_one_device(name, mesh):
    tx = MEMBERS[name](loss_fn)

    def step(params, state, batch):
        return tx.update(jax.grad(loss_fn)(params, batch), state, params, batch=batch)

    outs, state = trained(jax.jit(step), tx, 2)
    tx = MEMBERS[name](loss_fn, execution=Execution(axis_name=AXIS))
    for found, found_state in (on_mesh(tx, mesh, True, True), on_one_device(tx, True)):
        close(found, outs)
        close(flat(found_state), flat(state))


def test_local_perturbations_are_not_the_global_one():
    local, _ = on_one_device(
        MEMBERS["sam"](loss_fn, execution=Execution(axis_name=AXIS, sync_perturbation=False)), False
    )
    together, _ = on_one_device(MEMBERS["sam"](loss_fn, execution=Execution(axis_name=AXIS)), True)
    assert np.abs(local - together).max() > 1e-3


def test_a_broken_part_falls_back_alone_and_counts_once():
    """The other parts keep their perturbations; the mean has the plain gradient of that part."""
    flat_part = 3
    batch = SPLIT.copy()
    batch[flat_part] = 0  # a loss without a gradient in this part
    tx = sam(loss_fn, 0.5, execution=Execution(axis_name=AXIS, sync_perturbation=False))
    state = tx.init(W)
    update = lambda part: tx.update(jax.grad(loss_fn)(W, part), state, W, batch=part)
    gradient, after = jax.jit(jax.vmap(update, axis_name=AXIS))(jnp.asarray(batch))
    alone = sam(loss_fn, 0.5)
    one = jax.jit(lambda part: alone.update(jax.grad(loss_fn)(W, part), alone.init(W), W, batch=part)[0])
    parts = [one(part) for part in batch]
    assert not np.any(parts[flat_part])
    close(gradient, np.tile(np.mean(parts, axis=0), (PARTS, 1)))
    np.testing.assert_array_equal(after.diagnostics.guarded_steps, 1)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mask_that_moves_is_shared_and_keeps_its_size(check_vma, mesh):
    """It follows the averaged gradient, on one device and on eight."""
    ascent = dynamic_sparse_ascent(sparsity=0.6, drop=1.0, update_every=1)
    tx = sam(loss_fn, 0.5, ascent=ascent, execution=Execution(axis_name=AXIS, sync_perturbation=False))
    outs, state = looped(partial(sam, rho=0.5, ascent=ascent), steps=3)
    found, found_state = on_mesh(tx, mesh, check_vma, False, steps=3)
    close(found, outs)
    np.testing.assert_array_equal(found_state.ascent.mask, state.ascent.mask)
    assert np.sum(found_state.ascent.mask) == 2
    assert np.any(found_state.ascent.mask != ascent.init(jnp.asarray(W)).mask)


# Decoupled WSAM feeds its base with the mean of g, whatever came in


@pytest.mark.parametrize(("is_synced", "check_vma"), [(True, True), (False, True), (False, False)])
def test_decoupled_wsam_on_eight_devices(is_synced, check_vma, mesh):
    make = partial(decoupled_wsam, loss_fn, optax.sgd(ETA, momentum=0.9), ETA, rho=0.5, gamma=0.8)
    tx = make(execution=Execution(axis_name=AXIS, sync_perturbation=is_synced))
    found, _ = on_mesh(_signed(tx), mesh, check_vma, is_synced, steps=3)
    on_one, _ = on_one_device(_signed(tx), is_synced, steps=3)
    params, momentum, expected = jnp.asarray(W), 0, []

    def g_plus_of(w, part):
        g = grad_fn(w, part)
        return grad_fn(w + 0.5 * g / jnp.linalg.norm(g), part)

    for _ in range(3):
        g = grad_fn(params, BATCH)
        plus = np.mean([g_plus_of(params, part) for part in ([BATCH] if is_synced else SPLIT)], axis=0)
        momentum = 0.9 * momentum + g
        expected.append(momentum + 4 * (plus - g))
        params = params - ETA * expected[-1]
    close(found, expected)
    close(on_one, expected)


def _signed(tx):
    """Updates as gradients, so that ``trained`` can apply both alike."""

    def update(grads, state, params, **extra_args):
        updates, state = tx.update(grads, state, params, **extra_args)
        return -updates / ETA, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


# Policies


@pytest.mark.parametrize(
    "policy", [partial(periodic, k=2), partial(look, k=2), adaptive_policy], ids=["periodic", "look", "adaptive"]
)
def test_policies_with_global_perturbations_decide_alike_on_all_devices(policy, mesh):
    steps = 4
    expected = policy(gsam(loss_fn, 0.5))
    outs, state = trained(
        jax.jit(lambda w, s, b: expected.update(jax.grad(loss_fn)(w, b), s, w, batch=b)), expected, steps
    )
    found, found_state = on_mesh(
        policy(gsam(loss_fn, 0.5, execution=Execution(axis_name=AXIS))), mesh, True, True, steps
    )
    close(found, outs)
    close(flat(found_state), flat(state))


def test_a_policy_over_local_perturbations_needs_its_result_averaged():
    """As its documentation says: a full step stays as it is, a step between becomes the averaged gradient."""
    tx = periodic(sam(loss_fn, 0.5, execution=Execution(axis_name=AXIS, sync_perturbation=False)), k=2)

    def averaged(grads, state, params, **extra_args):
        gradient, state = tx.update(grads, state, params, **extra_args)
        return jax.lax.pmean(gradient, AXIS), state

    found, _ = on_one_device(optax.GradientTransformationExtraArgs(tx.init, averaged), False)
    full, _ = looped(partial(sam, rho=0.5), steps=1)
    close(found[0], full[0])
    close(found[1], jax.grad(loss_fn)(W - ETA * full[0], BATCH))


def test_perturbations_without_an_axis_are_plain():
    """sync_perturbation has nothing to say then, and nothing is evaluated twice."""
    recorded, points = recording(loss_fn)
    grads = jax.grad(loss_fn)(W, BATCH)
    tx = sam(recorded, 0.5, execution=Execution(sync_perturbation=False))
    gradient, _ = tx.update(grads, tx.init(W), W, batch=BATCH)
    jax.effects_barrier()
    assert len(points) == 2
    plain = sam(loss_fn, 0.5)
    np.testing.assert_array_equal(gradient, plain.update(grads, plain.init(W), W, batch=BATCH)[0])
