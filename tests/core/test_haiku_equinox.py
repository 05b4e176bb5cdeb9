"""CR-SAM in Haiku and in Equinox: the same chain, with each library's own notion of params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import crsam

BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
LABELS = jnp.asarray(np.asarray(BATCH)[:, 0] * np.asarray(BATCH)[:, 1] > 0, jnp.int32)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def learns(loss_fn, params, **kwargs):
    """Trains with CR-SAM in front of SGD, and returns the first and the last loss and the state."""
    tx = optax.chain(crsam(loss_fn, rho=0.05), optax.sgd(0.3, momentum=0.9))

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, **kwargs)
        updates, opt_state = tx.update(grads, opt_state, params, **kwargs)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(60):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    np.testing.assert_allclose(optax.tree.get(opt_state, "loss"), losses[-1], rtol=1e-6)  # of the same batch
    return losses[0], losses[-1], params


def test_haiku():
    """Pure functions of params, with the dropout's key among the arguments of the loss."""
    hk = pytest.importorskip("haiku")

    def forward(x):
        hidden = jax.nn.tanh(hk.Linear(16)(x))
        return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.1, hidden))

    model = hk.transform(forward)

    def loss_fn(params, x, labels, rng):
        return cross_entropy(model.apply(params, rng, x), labels)

    params = model.init(jax.random.key(0), BATCH)
    first, last, _ = learns(loss_fn, params, x=BATCH, labels=LABELS, rng=jax.random.key(1))
    assert last < 0.3 * first


def test_equinox():
    """Only inexact arrays are params; activations and the like are closed over."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, width_size=16, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, labels):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), labels)

    first, last, params = learns(loss_fn, params, x=BATCH, labels=LABELS)
    assert last < 0.3 * first
    assert eqx.combine(params, static)(BATCH[0]).shape == (2,)
