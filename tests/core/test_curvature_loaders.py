"""Data sets with empty batches, loaders that change, and arguments of unusual types."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import curvature, landscape


def masked_loss(w, batch, mask):
    return jnp.sum(mask * (w * batch) ** 2) / jnp.sum(mask)


def test_a_batch_of_padding_contributes_nothing():
    data = [
        {"batch": jnp.ones(4), "mask": jnp.array([1.0, 1.0, 0.0, 0.0])},
        {"batch": jnp.ones(4), "mask": jnp.zeros(4)},
    ]
    kwargs = {"example_count": lambda batch: float(batch["mask"].sum())}
    args, key = (masked_loss, jnp.ones(()), data), jax.random.key(0)
    assert curvature.gradient_norm(*args, **kwargs) == 2.0
    assert curvature.hessian_trace(*args, key=key, **kwargs).mean == 2.0
    assert curvature.top_eigenvalues(*args, key=key, **kwargs).values[0] == 2.0
    assert landscape.line(*args[:2], jnp.ones(()), [1.0], data, **kwargs)[0] == 4.0


class Loader:
    """Calls ``draw`` with the number of the pass."""

    def __init__(self, draw):
        self.draw, self.passes = draw, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.draw(self.passes))


def loss_fn(w, batch):
    return jnp.mean((batch @ w) ** 2)


EXAMPLES = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def in_batches(examples, size=4, kind=np.asarray):
    return [{"batch": kind(examples[i : i + size])} for i in range(0, len(examples), size)]


def shuffled(examples, number):
    return np.random.default_rng(number).permutation(examples)


CHANGING = {
    "other noise in each pass": lambda n: in_batches(EXAMPLES + 0.01 * np.random.default_rng(n).normal(size=(12, 3))),
    "shuffled, the rest dropped": lambda n: in_batches(shuffled(EXAMPLES, n)[:8]),
    "fewer in the second pass": lambda n: in_batches(EXAMPLES[: 12 if n == 1 else 8]),
    "arrays of jax": lambda n: in_batches(EXAMPLES * n, kind=jnp.asarray),
    "other labels": lambda n: [{"batch": (x, np.arange(4) % (2 + n))} for x in np.split(EXAMPLES, 3)],
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_loader_that_yields_other_examples_is_noticed(name):
    loss = (lambda w, batch: loss_fn(w, batch[0])) if "labels" in name else loss_fn
    with pytest.raises(ValueError, match="other examples in this pass"):
        curvature.top_eigenvalues(loss, jnp.ones(3), Loader(CHANGING[name]), key=jax.random.key(0))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_loader_that_only_shuffles_is_right(kind):
    expected = curvature.top_eigenvalues(loss_fn, jnp.ones(3), {"batch": EXAMPLES}, key=jax.random.key(0)).values
    loader = Loader(lambda n: in_batches(shuffled(EXAMPLES, n), size=5, kind=kind))
    found = curvature.top_eigenvalues(loss_fn, jnp.ones(3), loader, key=jax.random.key(0))
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)


def test_one_generator_handed_out_twice_is_named():
    generator = (batch for batch in in_batches(EXAMPLES))
    with pytest.raises(TypeError, match="returns the same one each time"):
        curvature.top_eigenvalues(loss_fn, jnp.ones(3), Loader(lambda n: generator), key=jax.random.key(0))


def test_messages_are_short():
    nested = {"batch": [[float(i + j) for j in range(200)] for i in range(200)]}
    with pytest.raises(ValueError, match="number of examples is not clear") as error:
        curvature.gradient_norm(lambda w, batch: w, jnp.ones(()), [nested])
    assert len(str(error.value)) < 1000
    params = {f"layer{i}": jnp.ones(2) for i in range(5000)}
    with pytest.raises(ValueError, match="tree structure") as error:
        curvature.hessian_vector_product(lambda p: p["layer0"].sum(), params, {})
    assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="vector of finite") as error:
        landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), np.full(900, np.nan))
    assert len(str(error.value)) < 1000


def test_whole_numbers_of_numpy():
    args, key = (lambda w: jnp.sum(w**2), jnp.ones(3)), jax.random.key(0)
    two = np.int64(2)
    assert curvature.hessian_trace(*args, key=key, num_probes=two).num_probes == 2
    assert len(curvature.top_eigenvalues(*args, key=key, num_eigenvalues=np.int32(1), num_steps=two).values) == 1
    spectrum = curvature.hessian_spectrum(*args, key=key, num_probes=two, num_steps=two, grid=np.int64(7))
    assert spectrum.grid.shape == (7,)
    assert len(curvature.worst_case_sharpness(*args, rho=0.1, num_steps=two).losses) == 3
    assert curvature.average_sharpness(*args, sigma=0.1, key=key, num_probes=two).num_probes == 2
    assert len(curvature.Batches({"batch": EXAMPLES}, np.int64(5))) == 3
    assert len(landscape.filter_normalized_directions(jnp.ones(3), key, two)) == 2
    landscape.line(jnp.sum, jnp.ones(2), jnp.ones(2), [0.0, 1.0], chunk_size=two)
    for wrong in (True, 2.0, "2", np.float32(2)):
        with pytest.raises(TypeError, match="whole number"):
            curvature.hessian_trace(*args, key=key, num_probes=wrong)


def test_losses_of_past_checkpoints_are_freed():
    class Weights:
        array = np.ones(3, np.float32)

    alive = []
    for _ in range(20):
        weights = Weights()
        alive.append(weakref.ref(weights))
        curvature.gradient_norm(lambda w, weights=weights: jnp.sum(w * weights.array), jnp.ones(3))
        del weights
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 8
