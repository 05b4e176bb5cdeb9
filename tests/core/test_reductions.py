"""Members of the family become each other at the ends of their parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import asam, crsam, gradient_norm_penalty, gsam, sam, wsam
from crsam_jax.ascents import adaptive_ascent
from tests.core.problems import flat, mlp, one_step

pytestmark = pytest.mark.usefixtures("x64")

RHO = 0.2
linear = partial(crsam, penalty="linear")
# Two sides of an equation: (method, options) each.
REDUCTIONS = {
    "crsam without penalty is sam": ((crsam, {"alpha": 0.0, "beta": 0.0}), (sam, {})),
    "eq. 7 without penalty is sam": ((crsam, {"alpha": 0.0, "beta": 0.0, "offset": 0.0}), (sam, {})),
    "linear crsam without penalty is sam": ((linear, {"alpha": 0.0, "beta": 0.0}), (sam, {})),
    "crsam bounded to nothing is sam": ((crsam, {"max_penalty_ratio": 0.0}), (sam, {})),
    "wsam of one half is sam": ((wsam, {"gamma": 0.5}), (sam, {})),
    "gsam without projection is sam": ((gsam, {"alpha": 0.0}), (sam, {})),
    "gradient norm of one is sam": ((gradient_norm_penalty, {"alpha": 1.0}), (sam, {})),
    "coupled wsam is gradient norm": ((wsam, {"gamma": 0.7}), (gradient_norm_penalty, {"alpha": 0.7 / 0.3})),
    "linear crsam of equal weights is gradient norm": (
        (linear, {"alpha": 0.3, "beta": 0.3}),
        (gradient_norm_penalty, {"alpha": 1.6}),
    ),
    "asam is sam with its ascent": ((asam, {"eta": 0.1}), (sam, {"ascent": adaptive_ascent(0.1)})),
    "asam with nothing adaptive is sam": (
        (asam, {"adaptive": lambda params: jax.tree.map(lambda _: False, params)}),
        (sam, {}),
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    (left, left_options), (right, right_options) = REDUCTIONS[name]
    found, _ = one_step(left(loss_fn, RHO, **left_options), loss_fn, params, batch=batch)
    expected, _ = one_step(right(loss_fn, RHO, **right_options), loss_fn, params, batch=batch)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("method", "options"), [(wsam, {"gamma": 0.0}), (gradient_norm_penalty, {"alpha": 0.0})])
def test_without_weight_only_the_base_optimizer_is_left(method, options):
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    found, _ = one_step(method(loss_fn, RHO, **options), loss_fn, params, batch=batch)
    np.testing.assert_allclose(flat(found), flat(jax.grad(loss_fn)(params, batch)), rtol=1e-12, atol=1e-14)


def test_log_form_tends_to_the_linear_form_as_the_offset_grows():
    """With α and β scaled by δ the difference falls as 1/δ."""
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    expected, _ = one_step(linear(loss_fn, RHO, 0.5, 0.2), loss_fn, params, batch=batch)
    errors = []
    for offset in (1e2, 1e4, 1e6):
        tx = crsam(loss_fn, RHO, 0.5 * offset, 0.2 * offset, offset=offset)
        found, _ = one_step(tx, loss_fn, params, batch=batch)
        errors.append(np.linalg.norm(flat(found) - flat(expected)) / np.linalg.norm(flat(expected)))
    np.testing.assert_allclose(np.array(errors[1:]) / errors[:-1], 1e-2, rtol=0.1)
    assert errors[-1] < 1e-6


def test_default_log_form_agrees_with_the_released_code_to_first_order_in_s_and_d():
    """Halving ρ halves S + D, and with it the relative difference of the penalties' first-order parts."""
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    differences = []
    for rho in (0.02, 0.01):
        results = [flat(one_step(m(loss_fn, rho, 0.0, 0.5), loss_fn, params, batch=batch)[0]) for m in (crsam, linear)]
        differences.append(np.linalg.norm(results[0] - results[1]))
    assert differences[1] == pytest.approx(differences[0] / 4, rel=0.05)  # (g⁺ − g⁻) · D ~ ρ²


def test_sam_is_opaque_optax_sam_through_training():
    loss_fn, params, batch = mlp(dtype=jnp.float64)
    base = optax.sgd(0.1, momentum=0.9)
    ours = optax.chain(sam(loss_fn, RHO), base)
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(base, climb, opaque_mode=True)
    gradient_at = lambda p, i: jax.grad(loss_fn)(p, batch)
    p, q, s, t = params, params, ours.init(params), theirs.init(params)
    for _ in range(5):
        updates, s = ours.update(gradient_at(p, 0), s, p, batch=batch)
        p = optax.apply_updates(p, updates)
        updates, t = theirs.update(gradient_at(q, 0), t, q, grad_fn=gradient_at)
        q = optax.apply_updates(q, updates)
    np.testing.assert_allclose(flat(p), flat(q), rtol=1e-10, atol=1e-12)
    assert np.linalg.norm(flat(p) - flat(params)) > 0.1
