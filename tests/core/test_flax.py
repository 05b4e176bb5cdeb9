"""With flax, Linen and nnx: the same dropout masks in all passes, and BatchNorm statistics of the clean pass alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

from crsam_jax import Execution, crsam, eval_params, msam, sam
from tests.core.problems import flat

RNG = np.random.default_rng(0)
BATCH = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32), jnp.asarray(RNG.integers(0, 3, size=16))
METHODS = {"sam": sam, "crsam": crsam}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(8)(x))
        kept = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))
        self.sow("seen", "kept", kept)
        return nn.Dense(3)(nn.relu(x) * kept)


def linen_loss(params, batch, model_state, rng):
    x, labels = batch
    variables = {"params": params, **model_state}
    logits, new_state = Linen().apply(variables, x, mutable=["batch_stats"], rngs={"dropout": rng})
    return cross_entropy(logits, labels), new_state


def linen_start():
    variables = Linen().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, BATCH[0])
    return variables["params"], {"batch_stats": variables["batch_stats"]}


@pytest.mark.parametrize("name", METHODS)
def test_linen_with_a_plain_loop(name):
    """The recipe: aux of the clean pass is kept; batch, model state and rng go to update as they went to the loss."""
    params, model_state = linen_start()
    tx = optax.chain(METHODS[name](linen_loss, has_aux=True), optax.sgd(0.1))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, model_state, opt_state, rng):
        inputs = {"batch": BATCH, "model_state": model_state, "rng": rng}
        (loss, new_state), grads = jax.value_and_grad(linen_loss, has_aux=True)(params, **inputs)
        updates, opt_state = tx.update(grads, opt_state, params, **inputs)
        return optax.apply_updates(params, updates), new_state, opt_state, loss

    for i in range(3):
        rng = jax.random.key(i)
        _, clean = linen_loss(params, BATCH, model_state, rng)
        params, model_state, opt_state, loss = step(params, model_state, opt_state, rng)
        np.testing.assert_allclose(flat(model_state), flat(clean), rtol=1e-5)
        assert optax.tree.get(opt_state, "loss") == loss
        assert optax.tree.get(opt_state, "loss_plus") != loss


def test_dropout_masks_are_equal_in_all_passes():
    """The probes of a linear loss under dropout differ by exactly the slope only if the masks agree."""

    def loss_fn(params, rng):
        mask = jax.random.bernoulli(rng, 0.5, params.shape)
        return jnp.sum(jnp.where(mask, params, 0.0) * jnp.arange(1.0, 101.0))

    params = jnp.ones(100)
    for seed in range(3):
        rng = jax.random.key(seed)
        grads = jax.grad(loss_fn)(params, rng)
        for evaluation in ("vmap", "sequential", "ordered"):
            tx = crsam(loss_fn, rho=0.5, execution=Execution(evaluation))
            gradient, state = tx.update(grads, tx.init(params), params, rng=rng)
            assert float(state.diagnostics.curvature) == pytest.approx(0, abs=0.1)
            assert float(state.diagnostics.slope) == pytest.approx(float(state.diagnostics.grad_norm), rel=1e-4)
            np.testing.assert_array_equal(gradient == 0, grads == 0)


def test_linen_dropout_drops_the_same_units_at_the_probes():
    params, model_state = linen_start()
    kept = []

    def loss_fn(params, rng):
        variables = {"params": params, **model_state}
        logits, seen = Linen().apply(variables, BATCH[0], mutable=["batch_stats", "seen"], rngs={"dropout": rng})
        jax.debug.callback(lambda mask: kept.append(np.asarray(mask)), seen["seen"]["kept"][0])
        return cross_entropy(logits, BATCH[1])

    tx = crsam(loss_fn, execution=Execution("sequential"))
    tx.update(jax.grad(loss_fn)(params, jax.random.key(3)), tx.init(params), params, rng=jax.random.key(3))
    jax.effects_barrier()
    assert len(kept) >= 4  # the caller's pass, L(w), two probes
    assert all(np.array_equal(kept[0], other) for other in kept)
    assert 0.2 < np.mean(kept[0] > 0) < 0.8


def test_linen_train_state_is_fed_through_tx_because_apply_gradients_forwards_nothing():
    params, model_state = linen_start()
    tx = optax.chain(sam(linen_loss, has_aux=True), optax.sgd(0.1))
    state = train_state.TrainState.create(apply_fn=Linen().apply, params=params, tx=tx)
    inputs = {"batch": BATCH, "model_state": model_state, "rng": jax.random.key(0)}
    grads, _ = jax.grad(linen_loss, has_aux=True)(state.params, **inputs)
    with pytest.raises(TypeError, match="'batch', 'model_state', 'rng'"):
        state.apply_gradients(grads=grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **inputs)
    new = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    assert np.linalg.norm(flat(new.params) - flat(params)) > 1e-3


# nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("name", METHODS)
def test_nnx_with_its_optimizer(name):
    """The recipe: the rest of the state is split off before the clean pass and given to both."""
    model = Net(nnx.Rngs(0))
    graphdef, _, _ = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, rest, batch):
        x, labels = batch
        net = nnx.merge(graphdef, params, rest, copy=True)
        loss = cross_entropy(net(x), labels)
        return loss, nnx.state(net, nnx.Not(nnx.Param))

    optimizer = nnx.Optimizer(model, optax.chain(METHODS[name](loss_fn, has_aux=True), optax.sgd(0.1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        (loss, new_rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, batch)
        optimizer.update(model, grads, rest=rest, batch=batch)
        nnx.update(model, new_rest)
        return loss

    for _ in range(3):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        clean_loss, clean = loss_fn(params, rest, BATCH)
        dropped = leaf(rest, ("dropout", "rngs", "count")).copy()
        loss = step(model, optimizer, BATCH)
        found = nnx.state(model, nnx.Not(nnx.Param))
        assert float(loss) == pytest.approx(float(clean_loss), rel=1e-5)
        assert float(optax.tree.get(optimizer.opt_state, "loss")[...]) == pytest.approx(float(loss), rel=1e-6)
        for path in (("norm", "mean"), ("norm", "var")):
            np.testing.assert_allclose(leaf(found, path), leaf(clean, path), rtol=1e-4, atol=1e-6)
        assert leaf(found, ("dropout", "rngs", "count")) == dropped + 1


def leaf(state, path):
    for key in path:
        state = state[key]
    return np.asarray(state[...])


def test_a_rest_of_another_pass_betrays_itself_in_the_loss():
    """What the recipe prevents: statistics or dropout counts of after the clean pass given to the probes."""

    def loss_fn(params, rest):
        net = nnx.merge(graphdef, params, rest, copy=True)
        return cross_entropy(net(BATCH[0]), BATCH[1]), nnx.state(net, nnx.Not(nnx.Param))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    (loss, after), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest)
    tx = crsam(loss_fn, has_aux=True)
    _, right = tx.update(grads, tx.init(params), params, rest=rest)
    _, wrong = tx.update(grads, tx.init(params), params, rest=after)
    assert right.diagnostics.loss == loss
    assert abs(wrong.diagnostics.loss - loss) > 1e-3


def test_nnx_with_an_optimizer_that_shifts_the_params():
    """The weights without the shift are those of a plain loop over the split-off params."""
    make = lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    loss_fn = lambda model: cross_entropy(model(BATCH[0]), BATCH[1])
    tx = optax.chain(optax.clip_by_global_norm(1.0), msam(optax.adam(0.1), rho=0.5))
    model = make()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, params = nnx.split(make())
    state = tx.init(params)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss_fn)(model))
        grads = jax.grad(lambda params: loss_fn(nnx.merge(graphdef, params)))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    held = nnx.state(model, nnx.Param)
    found = eval_params(optimizer.opt_state, held)
    assert jax.tree.structure(found) == jax.tree.structure(held)
    np.testing.assert_allclose(flat(found), flat(eval_params(state, params)), rtol=1e-5)
    assert np.linalg.norm(flat(found) - flat(held)) == pytest.approx(0.5, rel=1e-4)
