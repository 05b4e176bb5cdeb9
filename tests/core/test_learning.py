"""Real training on scikit-learn's digits learns."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from crsam_jax import crsam
from tests.core.problems import MEMBERS

STEPS, BATCH_SIZE = 300, 64


def loss_fn(params, batch):
    x, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), labels).mean()


def logits_of(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@cache
def digits():
    x, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, labels = jnp.asarray(x[order] / 16 - 0.3, jnp.float32), jnp.asarray(labels[order])
    return (x[:1000], labels[:1000]), (x[1000:], labels[1000:])


def train(tx, seed=0):
    """Test accuracy and the last diagnostics, after training with ``tx`` at the head of SGD with momentum."""
    (x, labels), (x_test, labels_test) = digits()
    optimizer = optax.chain(tx, optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9))
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w1": jax.random.normal(keys[0], (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(keys[1], (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            rows = jax.random.choice(key, len(labels), (BATCH_SIZE,), replace=False)
            batch = x[rows], labels[rows]
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = optimizer.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(keys[2], STEPS))[0]

    params, state = run(params)
    accuracy = jnp.mean(jnp.argmax(logits_of(params, x_test), axis=-1) == labels_test)
    return float(accuracy), state[0].diagnostics


@pytest.mark.parametrize("name", ["sam", "crsam"])
def test_training_learns(name):
    accuracy, diagnostics = train(MEMBERS[name](loss_fn))
    assert accuracy > 0.93
    assert diagnostics.guarded_steps == 0


def test_eq_7_needs_a_bound_at_the_papers_values():
    """α = 0.5, β = 0.1: the unbounded logarithms drown the loss, bounded ones do not."""
    free, _ = train(crsam(loss_fn, 0.1, 0.5, 0.1, offset=0.0))
    bounded, diagnostics = train(crsam(loss_fn, 0.1, 0.5, 0.1, offset=0.0, max_penalty_ratio=0.5))
    assert bounded > 0.93
    assert diagnostics.bounded_steps > 0
    assert free < bounded - 0.05
