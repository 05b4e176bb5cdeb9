"""When to pay: policies against plain loops, the work they skip, and the choice made on the host."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import Execution, adaptive_policy, crsam, gsam, is_full_step, look, periodic, random_probes, rsam, sam
from crsam_jax.ascents import adaptive_ascent, friendly_ascent
from tests.core.problems import broken_at, flat, recording

pytestmark = pytest.mark.usefixtures("x64")

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
SCHEDULE = optax.linear_schedule(1.0, -1.0, 6)
POLICIES = {
    "periodic": partial(periodic, k=3),
    "look": partial(look, k=3),
    "adaptive_policy": partial(adaptive_policy, threshold=SCHEDULE),
}


def loss_fn(w):
    """A curved loss, cheap to compile."""
    return jnp.sum(jnp.array([1.0, 2.0, 5.0, 0.5]) * w**2) / 2 + jnp.sum(jnp.sin(w)) / 3


def gradients(n, seed=0):
    """Incoming gradients of very different sizes, so that the adaptive rule has something to tell apart."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, 4)) * rng.lognormal(size=(n, 1)))


W = np.array([0.3, -1.0, 0.7, 2.0])  # of numpy, to be float64 inside x64


def run(tx, grads, params=W):
    """The gradients that come out at fixed params, and the state after each step."""
    state, outs, states = tx.init(params), [], []
    update = jax.jit(tx.update)
    for g in grads:
        out, state = update(g, state, params)
        outs.append(np.asarray(out))
        states.append(state)
    return np.array(outs), states


# Each policy against a plain loop


@pytest.mark.parametrize("policy", [periodic, look])
def test_a_period_of_one_is_the_member_itself(policy):
    grads = gradients(4)
    found, states = run(policy(crsam(loss_fn), k=1), grads)
    expected, plain = run(crsam(loss_fn), grads)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(flat(states[-1].inner_state), flat(plain[-1]))
    assert states[-1].full_steps == 4


@pytest.mark.parametrize(
    "member",
    [
        crsam(loss_fn, rho=optax.linear_schedule(0.1, 0.5, 3)),
        rsam(loss_fn, sigma=0.2),
        crsam(loss_fn, ascent=friendly_ascent()),
        crsam(loss_fn, ascent=adaptive_ascent(), probes=random_probes(k=2)),
    ],
    ids=["schedule", "noise", "memory", "random probes"],
)
def test_periodic_is_the_member_at_every_kth_step_and_g_between(member):
    """The member's own state sees its full steps alone."""
    grads = gradients(7)
    found, states = run(periodic(member, k=3), grads)
    full, member_states = run(member, grads[::3])
    expected = np.array(grads)
    expected[::3] = full
    close(found, expected)
    assert [int(s.full_steps) for s in states] == [1, 1, 1, 2, 2, 2, 3]
    for i, s in enumerate(states):
        close(flat(s.inner_state), flat(member_states[i // 3]))


def look_in_numpy(full, grads, k, strength):
    outs = []
    for i, g in enumerate(np.asarray(grads)):
        if i % k == 0:
            r = full[i // k]
            rest = r - (g @ r) / (g @ g) * g
            outs.append(r)
        else:
            outs.append(g + strength * np.linalg.norm(g) * rest / np.linalg.norm(rest))
    return np.array(outs)


@pytest.mark.parametrize("member", [sam(loss_fn, 0.5), crsam(loss_fn, 0.5)], ids=["sam", "crsam"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_look_reuses_the_orthogonal_part(member, strength):
    grads = gradients(7)
    found, states = run(look(member, k=3, strength=strength), grads)
    full, _ = run(member, grads[::3])
    close(found, look_in_numpy(full, grads, 3, strength))
    for i in (0, 3, 6):
        assert abs(states[i].orthogonal @ grads[i]) < 1e-12 * np.linalg.norm(grads[i])
        assert np.linalg.norm(states[i].orthogonal) == pytest.approx(1)


def test_look_has_one_norm_for_the_whole_tree():
    tree = {"a": W[:1], "b": W[1:]}
    tree_loss = lambda w: loss_fn(jnp.concatenate([w["a"], w["b"]]))
    tx, state = look(sam(tree_loss, 0.5), k=2), None
    state = tx.init(tree)
    g = jax.grad(tree_loss)(tree)
    for _ in range(2):
        out, state = tx.update(g, state, tree)
    expected, _ = run(look(sam(loss_fn, 0.5), k=2), [jax.grad(loss_fn)(W)] * 2)
    close(flat(out), expected[1])


def adaptive_in_numpy(grads, thresholds, decay):
    """Which steps are full, and the running statistics of ‖g‖² (AE-SAM)."""
    mean = variance = 0.0
    full, statistics = [], []
    for g, c in zip(np.asarray(grads), thresholds, strict=True):
        s = g @ g
        mean = decay * mean + (1 - decay) * s
        variance = decay * variance + (1 - decay) * (s - mean) ** 2
        full.append(bool(s >= mean + c * np.sqrt(variance)))
        statistics.append((mean, variance))
    return np.array(full), np.array(statistics)


@pytest.mark.parametrize(("threshold", "decay"), [(0.0, 0.9), (-0.3, 0.5), (optax.linear_schedule(1.0, -0.5, 24), 0.9)])
def test_adaptive_policy_is_a_loop_in_numpy(threshold, decay):
    grads, member = gradients(24), gsam(loss_fn, 0.5)
    thresholds = [float(threshold(i)) if callable(threshold) else threshold for i in range(24)]
    is_full, statistics = adaptive_in_numpy(grads, thresholds, decay)
    assert 4 < is_full.sum() < 23  # both happen
    found, states = run(adaptive_policy(member, threshold, decay), grads)
    full, _ = run(member, grads)
    close(found, np.where(is_full[:, None], full, grads))
    close([(s.mean, s.variance) for s in states], statistics)
    np.testing.assert_array_equal([s.full_steps for s in states], np.cumsum(is_full))
    np.testing.assert_allclose([s.full_fraction for s in states], np.cumsum(is_full) / np.arange(1, 25), rtol=1e-6)


# Skipped work


def counted(policy):
    """The policy around CR-SAM, and a list with one entry for every evaluation of the loss."""
    recorded, points = recording(loss_fn)
    return policy(crsam(recorded)), points


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_skipped_work_is_skipped(name, on_host):
    """A full step evaluates the loss at w, w + ρv and w − ρv, another step nowhere, in one program or in two."""
    tx, points = counted(POLICIES[name])
    state, calls, expected = tx.init(W), [], []
    update = jax.jit(tx.update, static_argnames="full_step")
    for g in gradients(7):
        due = bool(is_full_step(state, g))
        expected.append(3 * due)
        before = len(points)
        out, state = update(g, state, W, **({"full_step": due} if on_host else {}))
        jax.block_until_ready(out)
        jax.effects_barrier()
        calls.append(len(points) - before)
    assert calls == expected
    assert 0 < np.count_nonzero(expected) < 7


@pytest.mark.parametrize("name", POLICIES)
def test_a_choice_made_on_the_host_leaves_no_conditional_in_the_program(name):
    tx = POLICIES[name](crsam(loss_fn, execution=Execution("sequential")))
    trace = lambda **options: str(jax.make_jaxpr(partial(tx.update, **options))(W, tx.init(W), W))
    assert "cond[" in trace()
    assert "cond[" not in trace(full_step=True) + trace(full_step=False)


# The choice made on the host


@pytest.mark.parametrize("name", POLICIES)
def test_a_choice_made_on_the_host_gives_the_same_run(name):
    tx = optax.chain(POLICIES[name](crsam(loss_fn, 0.5)), optax.sgd(0.1, momentum=0.9))
    step = jax.jit(partial(train_step, tx), static_argnames="full_step")
    traced = chosen = W, tx.init(W)
    choices = []
    for scale in (1.0, 0.1, 2.0, 0.5, 3.0, 0.1, 1.0):
        grads = scale * jax.grad(loss_fn)(chosen[0])
        choices.append(bool(is_full_step(chosen[1], grads)))
        traced, chosen = step(traced, scale), step(chosen, scale, full_step=choices[-1])
    close(flat(chosen), flat(traced))
    assert set(choices) == {True, False}
    assert optax.tree.get(chosen[1], "full_steps") == sum(choices)


def train_step(tx, carry, scale=1.0, full_step=None):
    params, state = carry
    grads = scale * jax.grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params, full_step=full_step)
    return optax.apply_updates(params, updates), state


def test_the_callers_choice_overrides_the_rule():
    tx = periodic(sam(loss_fn, 0.5), k=3)
    state, g = tx.init(W), jax.grad(loss_fn)(W)
    skipped, state = tx.update(g, state, W, full_step=False)
    np.testing.assert_array_equal(skipped, g)
    full, state = tx.update(g, state, W, full_step=True)
    close(full, run(sam(loss_fn, 0.5), [g])[0][0])
    assert (int(state.steps), int(state.full_steps)) == (2, 1)
    traced, _ = tx.update(g, state, W, full_step=jnp.array(True))
    close(traced, full)


def test_is_full_step_needs_one_policy():
    member = sam(loss_fn)
    nested = optax.chain(periodic(look(member), k=2), optax.sgd(0.1))
    assert is_full_step(nested.init(W), W)  # the outer one decides
    for tx, number in ((member, 0), (optax.chain(periodic(member, 2), periodic(member, 3)), 2)):
        with pytest.raises(ValueError, match=f"one policy .* found {number}"):
            is_full_step(tx.init(W), W)


# Composition


def test_policies_nest():
    """Every second step LookSAM, of which every second is full: full, g, reused, g, full, ..."""
    grads = gradients(6)
    found, _ = run(periodic(look(sam(loss_fn, 0.5), k=2), k=2), grads)
    full, _ = run(sam(loss_fn, 0.5), grads[::4])
    expected = np.array(grads)
    expected[::2] = look_in_numpy(full, grads[::2], 2, 0.7)
    close(found, expected)


@pytest.mark.parametrize(
    "tx",
    [periodic(crsam(loss_fn), 2), look(crsam(loss_fn), 2), adaptive_policy(gsam(loss_fn))],
    ids=["periodic crsam", "look crsam", "adaptive gsam"],
)
def test_policies_train_in_a_chain(tx):
    tx = optax.chain(tx, optax.clip_by_global_norm(1.0), optax.adam(0.1))
    step = jax.jit(partial(train_step, tx))
    carry = W, tx.init(W)
    for _ in range(60):
        carry = step(carry)
    assert np.linalg.norm(jax.grad(loss_fn)(carry[0])) < 0.2 * np.linalg.norm(jax.grad(loss_fn)(W))


# Guards


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_look_does_not_reuse_rounding_noise(rho, dtype):
    """Where the full result has the direction of g, its orthogonal part is noise, which must not be scaled up."""
    isotropic = lambda w: 0.5 * jnp.sum(w**2)
    params = jnp.asarray(np.random.default_rng(0).normal(size=1000), dtype)
    tx = look(sam(isotropic, rho), k=2)
    _, state = tx.update(params, tx.init(params), params)
    reused, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(reused, params)


def test_look_keeps_a_small_part_that_is_no_noise():
    reuse = look(sam(loss_fn, rho=1e-4), k=2)
    found, _ = run(reuse, [jax.grad(loss_fn)(W)] * 2)
    assert np.linalg.norm(found[1] - found[0]) > 0.5 * np.linalg.norm(found[0])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("full_step", [False, True])
def test_broken_and_zero_gradients_pass_through_every_kind_of_step(name, value, full_step):
    tx = POLICIES[name](crsam(loss_fn))
    _, state = tx.update(jnp.ones(4), tx.init(W), W, full_step=True)
    grads = jnp.zeros(4) if value == 0 else jnp.array([1.0, value, 0.0, 2.0])
    gradient, after = tx.update(grads, state, W, full_step=full_step)
    np.testing.assert_array_equal(gradient, grads)
    assert after.inner_state.diagnostics.guarded_steps == full_step
    if name == "adaptive_policy" and value != 0:
        assert (after.mean, after.variance) == (state.mean, state.variance)
        assert np.isfinite(after.full_fraction)
    healthy, after = tx.update(jnp.ones(4), after, W, full_step=False)
    assert np.all(np.isfinite(healthy))


def test_a_full_step_that_fails_leaves_nothing_to_reuse():
    broken = broken_at(loss_fn, lambda w: jnp.any(w != W))
    g = jax.grad(loss_fn)(W)
    found, _ = run(look(sam(broken, 0.5), k=2), [g, g])
    np.testing.assert_array_equal(found, [g, g])


# State


@pytest.mark.parametrize("name", POLICIES)
def test_state_contract(name):
    """One compilation with donation; scan is the loop; strong types and structure stay."""
    tx = optax.chain(POLICIES[name](crsam(loss_fn, rho=SCHEDULE)), optax.sgd(0.1, momentum=0.9))
    step = jax.jit(partial(train_step, tx), donate_argnums=0)
    scales = jnp.array([1.0, 0.1, 2.0, 0.5, 3.0])
    carry = jnp.copy(W), tx.init(W)
    signature = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    before = signature(carry[1])
    assert not any(x.weak_type for x in jax.tree.leaves(carry[1]))
    for scale in scales:
        carry = step(carry, scale)
    assert step._cache_size() == 1
    assert signature(carry[1]) == before
    scanned, _ = jax.lax.scan(lambda c, s: (train_step(tx, c, s), None), (W, tx.init(W)), scales)
    close(flat(scanned), flat(carry))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carry)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", POLICIES)
def test_vmap_over_runs_is_each_run_alone(name):
    """Under vmap the conditional becomes a selection."""
    tx = POLICIES[name](crsam(loss_fn))

    def outcome(grads):
        def body(state, g):
            gradient, state = tx.update(g, state, W)
            return state, gradient

        return jax.lax.scan(body, tx.init(W), grads)[1]

    runs = jnp.stack([gradients(5, seed) for seed in (1, 2)])
    close(jax.vmap(outcome)(runs), jnp.stack([outcome(grads) for grads in runs]))


@pytest.mark.parametrize("name", POLICIES)
def test_tree_map_params_finds_the_reused_direction_alone(name):
    tx = POLICIES[name](crsam(loss_fn))
    mapped = optax.tree_map_params(tx, lambda x: x + 10, tx.init(W), transform_non_params=lambda x: x - 1)
    touched = [x for x in jax.tree.leaves(mapped) if np.all(x == 10)]
    assert [x.shape for x in touched] == ([W.shape] if name == "look" else [])


def test_bad_arguments():
    for policy in (periodic, look):
        with pytest.raises(TypeError, match="k must be a whole number"):
            policy(sam(loss_fn), k=2.0)
        with pytest.raises(ValueError, match="k must be at least 1"):
            policy(sam(loss_fn), k=0)
    with pytest.raises(ValueError, match="strength"):
        look(sam(loss_fn), strength=-1.0)
    with pytest.raises(ValueError, match="decay"):
        adaptive_policy(sam(loss_fn), decay=1.0)
    for threshold, error in (("high", TypeError), (None, TypeError), (np.nan, ValueError)):
        with pytest.raises(error, match="threshold"):
            adaptive_policy(sam(loss_fn), threshold=threshold)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_look_returns_g_where_what_it_adds_overflows(dtype):
    largest = float(jnp.finfo(dtype).max)
    tx = look(sam(lambda w: w[0] ** 2 + 3 * w[1] ** 2, rho=0.5), k=2, strength=1.0)
    w = jnp.array([3.0, 1.0], dtype)
    _, state = tx.update(jnp.array([6.0, 6.0], dtype), tx.init(w), w)
    grads = jnp.array([0.9 * largest, 0.9 * largest], dtype)
    gradient, _ = tx.update(grads, state, w)
    np.testing.assert_array_equal(gradient, grads)
