"""A gradient or loss that is not that of the loss is counted at most steps, a right one at none."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import crsam_jax
from crsam_jax import Execution, crsam, random_probes, sam
from tests.core.problems import MEMBERS, TWO_SIDED, closed_form, mlp, polynomial

LOSS_FN, PARAMS, _ = mlp(examples=16)
BATCHES = [mlp(seed, examples=16)[2] for seed in range(8)]
METHODS = {
    "sam": sam,
    "asam": crsam_jax.asam,
    "momentum": partial(sam, ascent=crsam_jax.ascents.momentum_ascent()),
    "crsam": crsam,
    "crsam, adaptive": partial(crsam, ascent=crsam_jax.ascents.adaptive_ascent()),
    "crsam, masked": partial(crsam, mask={"first": True, "second": False}),
    "random probes": partial(crsam, probes=random_probes(1, 0.1)),
}
gradient = jax.jit(jax.grad(LOSS_FN))
loss_of = jax.jit(LOSS_FN)


@cache
def compiled_step(name):
    """One program a method, whatever the radius and the mistake."""

    @jax.jit
    def step(params, state, grads, loss, batch, rho):
        tx = METHODS[name](LOSS_FN, rho=rho)
        result, state = tx.update(grads, state, params, loss=loss, batch=batch)
        return optax.apply_updates(params, jax.tree.map(lambda g: -0.05 * g, result)), state

    return step


def share(name, grads_of=lambda params, batch, other: gradient(params, batch), loss_from="batch", rho=0.1):
    """The share of steps that a method counts as mismatched in eight steps of SGD with its gradient.

    Args:
      name: of the method.
      grads_of: from params, batch and another batch to the gradient passed in.
      loss_from: which batch the loss is of.
      rho: the radius.
    """
    params, state = PARAMS, METHODS[name](LOSS_FN).init(PARAMS)
    for batch, other in zip(BATCHES, BATCHES[1:] + BATCHES[:1], strict=True):
        grads, loss = grads_of(params, batch, other), loss_of(params, {"batch": batch, "other": other}[loss_from])
        params, state = compiled_step(name)(params, state, grads, loss, batch, rho)
    return int(state.diagnostics.mismatched_steps) / len(BATCHES)


def behind(before):
    """The gradient that reaches a method behind another transformation, in its first step."""
    return lambda params, batch, other: before.update(gradient(params, batch), before.init(params), params)[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_right_set_up_is_never_counted(name):
    for rho in (1e-3, 0.05, 0.5):
        assert share(name, rho=rho) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_scaled_gradient_is(name):
    """Summed over 16 examples, of a scaled loss, clipped. Along a direction of its own, most steps see it."""
    least = 0.75 if name == "momentum" else 1
    for scale in (0.1, 0.4, 3.0, 16.0):
        scaled = lambda params, batch, other, scale=scale: jax.tree.map(lambda g: scale * g, gradient(params, batch))
        assert share(name, scaled) >= least
    assert share(name, behind(optax.clip_by_global_norm(0.1))) >= least


@pytest.mark.parametrize("name", METHODS)
def test_a_method_behind_an_optimizer_is(name):
    for optimizer in (optax.sgd(0.1), optax.adam(1e-2), optax.add_decayed_weights(1.0)):
        assert share(name, behind(optimizer)) > 0.7


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"momentum"}))
def test_another_batch_is(name):
    other_grads = lambda params, batch, other: gradient(params, other)
    assert share(name, other_grads) > 0.7
    assert share(name, other_grads, loss_from="other") > 0.7
    assert share(name, loss_from="other", rho=0.01) > 0.7


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_the_loss_is_evaluated_where_it_is_not_given(name):
    """In whole chains, the right way round and the wrong one."""
    links = [METHODS[name](LOSS_FN, rho=0.1), optax.sgd(0.05)]
    for order, expected in ((links, 0), (links[::-1], 1)):
        tx = optax.chain(*order)
        _, state = jax.jit(tx.update)(gradient(PARAMS, BATCHES[0]), tx.init(PARAMS), PARAMS, batch=BATCHES[0])
        assert optax.tree.get(state, "mismatched_steps") == expected


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_the_mean_gradient_of_multisteps_is_where_the_parts_differ(name):
    """The mean over four batches meets the probes of one of them. On average they agree: some steps look right."""

    def mean(params, batch, other):
        others = [batch for batch in BATCHES if batch is not other][:3]
        return jax.tree.map(lambda *g: sum(g) / 4, *(gradient(params, part) for part in [batch, *others]))

    assert share(name, mean) >= 0.25


# What two passes of one step must share beside the batch.


@pytest.mark.parametrize("name", ["sam", "crsam", "random probes"])
def test_another_key_of_the_dropout_is(name):
    def loss_fn(params, batch, rng):
        x, labels = batch
        hidden = jnp.tanh(x @ params["first"]["w"])
        hidden = jnp.where(jax.random.bernoulli(rng, 0.5, hidden.shape), 2 * hidden, 0)
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["second"]["w"], labels).mean()

    tx = METHODS[name](loss_fn, rho=0.05)
    counts = {"same": 0, "other": 0}
    for i, batch in enumerate(BATCHES):
        small = jax.tree.map(lambda x: x[:4], batch)
        key, other = jax.random.split(jax.random.key(i))
        for which, used in (("same", key), ("other", other)):
            grads = jax.grad(loss_fn)(PARAMS, small, key)
            state = tx.update(grads, tx.init(PARAMS), PARAMS, batch=small, rng=used)[1]
            counts[which] += int(state.diagnostics.mismatched_steps)
    assert counts["same"] == 0
    assert counts["other"] >= 5


@pytest.mark.parametrize("name", ["sam", "crsam", "random probes"])
def test_a_model_state_taken_after_the_pass_is_where_the_loss_depends_on_it(name):
    """Normalized by a running mean square, which starts at 1 and is 4 after the pass."""

    def loss_fn(params, state, batch):
        x, labels = batch
        new = {"square": 0.5 * state["square"] + 0.5 * jnp.mean((x * 2.65) ** 2)}
        return LOSS_FN(params, (x / jnp.sqrt(state["square"]), labels)), new

    state = {"square": jnp.ones(())}
    (_, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(PARAMS, state, BATCHES[0])
    for given, expected in ((state, 0), (new, 1)):
        tx = METHODS[name](lambda params, batch, given=given: loss_fn(params, given, batch), rho=0.05, has_aux=True)
        found = tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCHES[0])[1]
        assert found.diagnostics.mismatched_steps == expected


# Devices


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_a_gradient_summed_over_the_axis_is(name, mesh):
    """Inside shard_map the gradient of replicated params is the sum already, unless they are cast."""
    tx = METHODS[name](LOSS_FN, rho=0.05, execution=Execution(axis_name="data"))

    def count(params, batch, is_cast):
        local = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), params) if is_cast else params
        grads = jax.lax.pmean(jax.grad(LOSS_FN)(local, batch), "data")
        return tx.update(grads, tx.init(params), params, batch=batch)[1].diagnostics.mismatched_steps

    for is_cast, expected in ((True, 0), (False, 1)):
        mapped = jax.shard_map(partial(count, is_cast=is_cast), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        assert jax.jit(mapped)(PARAMS, BATCHES[0]) == expected


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_an_averaged_gradient_without_axis_name_is_on_most_devices(name, mesh):
    """Each device probes its own two examples along the gradient of all."""

    def count(params, batch, tx):
        grads = jax.lax.pmean(jax.grad(LOSS_FN)(params, batch), "data")
        return tx.update(grads, tx.init(params), params, batch=batch)[1].diagnostics.mismatched_steps[None]

    found = {}
    for axis in (None, "data"):
        tx = METHODS[name](LOSS_FN, rho=0.05, execution=Execution(axis_name=axis))
        mapped = jax.shard_map(
            partial(count, tx=tx), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
        )
        found[axis] = np.mean(jax.jit(mapped)(PARAMS, BATCHES[0]))
    assert found["data"] == 0
    assert found[None] >= 0.5


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_parts_with_perturbations_of_their_own_are_consistent_each(name):
    tx = METHODS[name](LOSS_FN, rho=0.05, execution=Execution(axis_name="parts", sync_perturbation=False))
    parts = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), BATCHES[0])

    def count(batch, scale):
        grads = jax.tree.map(lambda g: scale * g, jax.grad(LOSS_FN)(PARAMS, batch))
        return tx.update(grads, tx.init(PARAMS), PARAMS, batch=batch)[1].diagnostics.mismatched_steps

    counts = jax.vmap(count, axis_name="parts")
    assert not np.any(counts(parts, jnp.ones(4)))
    assert np.all(counts(parts, jnp.array([1.0, 1.0, 1.0, 10.0])))  # a step is counted if any part is


# What is not judged


@pytest.mark.parametrize("name", ["sam", "crsam"])
@pytest.mark.parametrize("grads", [0.0, np.nan, np.inf])
def test_a_step_that_did_not_look_is_not_judged(name, grads):
    tx = METHODS[name](LOSS_FN, rho=0.1)
    grads = jax.tree.map(lambda w: jnp.full_like(w, grads), PARAMS)
    assert tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCHES[0])[1].diagnostics.mismatched_steps == 0
    tx = METHODS[name](LOSS_FN, rho=0.0)
    assert tx.update(PARAMS, tx.init(PARAMS), PARAMS, batch=BATCHES[0])[1].diagnostics.mismatched_steps == 0


@pytest.mark.parametrize("name", ["sam", "crsam"])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_losses_and_params_in_half_precision_are_noise_and_not_judged(name, scale):
    losses = lambda params, batch: LOSS_FN(params, batch).astype(jnp.bfloat16)
    low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    for loss_fn, params in ((losses, PARAMS), (LOSS_FN, low)):
        tx = METHODS[name](loss_fn, rho=0.02)
        grads = jax.tree.map(lambda g: scale * g, jax.grad(loss_fn)(params, BATCHES[0]))
        assert tx.update(grads, tx.init(params), params, batch=BATCHES[0])[1].diagnostics.mismatched_steps == 0


def test_a_given_loss_in_half_precision_is_noise_too():
    loss, grads = jax.value_and_grad(LOSS_FN)(PARAMS, BATCHES[0])
    for method in (sam, crsam):
        tx = method(LOSS_FN, rho=0.02)
        given = loss.astype(jnp.bfloat16)
        state = tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCHES[0], loss=given)[1]
        assert state.diagnostics.mismatched_steps == 0


def test_probes_that_have_nothing_to_do_with_each_other_are_not_judged():
    """A steep ditch at w between two slopes in other directions, at a radius far beyond its width."""
    loss_fn = lambda w: jnp.tanh(100 * w[0]) + jnp.where(w[0] > 0, w[1], w[2])
    w = jnp.array([0.0, 0.0, 0.0])
    seen = {}
    for method in (sam, crsam):
        tx = method(loss_fn, rho=0.5)
        seen[method] = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)[1].diagnostics.mismatched_steps
    assert (seen[sam], seen[crsam]) == (1, 0)  # from one side it looks like a gradient that is too large


# The limits, in closed form


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cubic", [False, True])
def test_the_limit_is_a_quarter_where_the_loss_is_a_cubic(cubic):
    """Simpson's rule is exact on it; what is added for its bend is |φ‴|/3."""
    problem, rho = polynomial(cubic), 0.1
    grads = jax.grad(problem.loss)(problem.params)
    tx = crsam(problem.loss, rho)
    state = lambda k: tx.update(jax.tree.map(lambda g: k * g, grads), tx.init(problem.params), problem.params)[1]
    v, g, *_ = closed_form(problem, rho)
    bend = rho**2 * abs(np.sum(problem.cubic * v**3)) / 3 / np.linalg.norm(g)
    for factor, expected in (
        ((1 + bend) / 0.75 - 1e-6, 0), ((1 + bend) / 0.75 + 1e-6, 1), (0.75 - bend + 1e-6, 0), (0.75 - bend - 1e-6, 1),
    ):  # fmt: skip
        assert state(factor).diagnostics.mismatched_steps == expected


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted(TWO_SIDED))
def test_the_loss_is_predicted_from_both_sides_exactly_where_it_is_a_cubic(name):
    problem, rho = polynomial(True), 0.1
    loss, grads = jax.value_and_grad(problem.loss)(problem.params)
    tx = MEMBERS[name](problem.loss, rho=rho)
    seen = lambda loss: tx.update(grads, tx.init(problem.params), problem.params, loss=loss)[1].diagnostics
    v, _, g_plus, difference, *_ = closed_form(problem, rho)
    limit = 0.25 * rho * max(abs(v @ g_plus), abs(v @ (g_plus - difference)))
    for sign in (1, -1):
        assert seen(loss + sign * 0.999 * limit).mismatched_steps == 0
        assert seen(loss + sign * 1.001 * limit).mismatched_steps == 1
