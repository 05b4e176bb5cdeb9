"""params in, same dtypes out; norms, differences and diagnostics at least float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import crsam, gradient_norm_penalty, sam
from tests.core.problems import MEMBERS, flat, mlp, one_step

HALF = [jnp.bfloat16, jnp.float16]


def in_dtypes(dtype, other=None):
    """The network with its params in ``dtype``, its second layer in ``other``; losses stay in float32."""
    loss_fn, params, batch = mlp()
    params = {
        "first": jax.tree.map(lambda x: x.astype(dtype), params["first"]),
        "second": jax.tree.map(lambda x: x.astype(other or dtype), params["second"]),
    }
    wide = lambda params, batch: loss_fn(
        jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params), batch
    )
    return wide, params, batch


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(
    ("dtype", "other"), [(jnp.bfloat16, None), (jnp.float16, None), (jnp.float32, None), (jnp.bfloat16, jnp.float32)]
)
def test_same_dtypes_out_and_diagnostics_in_float32(name, dtype, other):
    loss_fn, params, batch = in_dtypes(dtype, other)
    gradient, diagnostics = one_step(MEMBERS[name](loss_fn), loss_fn, params, batch=batch)
    assert dtypes(gradient) == dtypes(params)
    for field, value in diagnostics._asdict().items():
        assert value.dtype == (jnp.int32 if field.endswith("_steps") else jnp.float32), field


@pytest.mark.parametrize("name", MEMBERS)
def test_one_leaf_of_float64_makes_the_diagnostics_float64(name, x64):
    loss_fn, params, batch = in_dtypes(jnp.float32, jnp.float64)
    gradient, diagnostics = one_step(MEMBERS[name](loss_fn), loss_fn, params, batch=batch)
    assert dtypes(gradient) == dtypes(params)
    assert diagnostics.grad_norm.dtype == diagnostics.curvature.dtype == jnp.float64


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_follows_float32_as_far_as_its_digits_go(name, dtype):
    """Both start from the same rounded params; what differs is the rounding of w ± ρv and of the gradients."""
    loss_fn, params, batch = in_dtypes(dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    options = {} if name == "crsam_bounded" else {"rho": 0.3}
    tx = MEMBERS[name](loss_fn, **options)
    found, _ = one_step(tx, loss_fn, params, batch=batch)
    expected, _ = one_step(tx, loss_fn, wide, batch=batch)
    angle = flat(found) @ flat(expected) / np.linalg.norm(flat(found)) / np.linalg.norm(flat(expected))
    assert angle > (0.98 if dtype == jnp.bfloat16 else 0.999)


@pytest.mark.parametrize("dtype", HALF)
def test_norms_of_half_precision_do_not_overflow_or_stall(dtype):
    """‖g‖² = 90,000 is beyond float16, and a running sum in bfloat16 stops at 256."""
    loss_fn = lambda w: jnp.sum(w.astype(jnp.float32))
    _, diagnostics = one_step(crsam(loss_fn, rho=3.0), loss_fn, jnp.ones(90_000, dtype))
    assert diagnostics.grad_norm == 300
    assert diagnostics.cosine == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_the_combination_is_rounded_once(dtype):
    """(1−α) g + α g⁺ in half precision would round three times."""
    loss_fn = lambda w: 0.5 * jnp.sum(w.astype(jnp.float32) ** 2)
    w = jnp.asarray(np.random.default_rng(0).normal(size=500), dtype)
    found, _ = one_step(gradient_norm_penalty(loss_fn, 2.0, 0.3), loss_fn, w)
    wide = w.astype(jnp.float32)
    probe = (wide + 2.0 * wide / jnp.linalg.norm(wide)).astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(found, (0.7 * wide + 0.3 * probe).astype(dtype))


def test_float16_with_a_scaled_loss_gives_the_scaled_gradient():
    """SAM's direction does not see the loss's scale, so loss scaling goes through it."""
    loss_fn, params, batch = in_dtypes(jnp.float16)
    scaled_fn = lambda params, batch, scale: scale * loss_fn(params, batch)
    results = [flat(one_step(sam(scaled_fn), scaled_fn, params, batch=batch, scale=s)[0]) / s for s in (1.0, 256.0)]
    np.testing.assert_allclose(results[0], results[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_training_in_half_precision_learns(dtype):
    loss_fn, params, batch = in_dtypes(dtype)
    tx = optax.chain(crsam(loss_fn), optax.sgd(0.3))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert optax.tree.get(state, "guarded_steps") == 0
