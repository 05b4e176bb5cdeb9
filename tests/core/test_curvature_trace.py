"""The trace against the dense one: exact where it should be, and inside its error bar as often as it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsam_jax import curvature
from tests.core.curvature_problems import cut, dense_case, normal_like
from tests.core.problems import flat, mlp_loss, polynomial


def test_product_is_that_of_the_dense_hessian(x64):
    case = dense_case()
    vector = jax.tree.map(jnp.sin, case.params)
    product = curvature.hessian_vector_product(mlp_loss, case.params, vector, {"batch": case.batch})
    np.testing.assert_allclose(flat(product), case.hessian @ flat(vector), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("estimator", ["rademacher", "gaussian"])
def test_error_bar_covers_the_trace_in_the_right_share_of_repetitions(x64, estimator):
    a = np.random.default_rng(0).normal(size=(40, 40))  # large enough that zᵀHz is nearly normal
    loss_fn = lambda w, h: 0.5 * w @ h @ w
    results = [
        curvature.hessian_trace(
            loss_fn, jnp.zeros(40), {"h": a + a.T}, key=jax.random.key(i), num_probes=12, estimator=estimator
        )
        for i in range(120)
    ]
    scores = np.array([(r.mean - 2 * np.trace(a)) / r.standard_error for r in results])
    # Student's t with 11 degrees of freedom, within four standard deviations for 120 repetitions
    for bound, share in ((1, 0.661), (2, 0.929)):
        assert abs(np.mean(np.abs(scores) <= bound) - share) < 4 * np.sqrt(share * (1 - share) / 120)
    assert abs(np.mean(scores)) < 4 * np.sqrt(11 / 9 / 120)


def test_standard_error_has_its_closed_form(x64):
    problem = polynomial(cubic=False)
    h = problem.hessian
    expected = {
        "rademacher": 2 * (np.sum(h**2) - np.sum(np.diag(h) ** 2)),
        "gaussian": 2 * np.sum(h**2),
    }
    for estimator, variance in expected.items():
        result = curvature.hessian_trace(
            problem.loss, problem.params, key=jax.random.key(1), num_probes=600, estimator=estimator
        )
        np.testing.assert_allclose(result.standard_error, np.sqrt(variance / 600), rtol=0.2)
        assert abs(result.mean - np.trace(h)) < 4 * result.standard_error


def test_estimate_is_mean_and_standard_error_of_its_quadratic_forms(x64):
    case, key = dense_case(), jax.random.key(3)
    result = curvature.hessian_trace(
        mlp_loss, case.params, {"batch": case.batch}, key=key, num_probes=5, estimator="gaussian"
    )
    probes = [flat(normal_like(probe_key, case.params)) for probe_key in jax.random.split(key, 5)]
    forms = [z @ case.hessian @ z for z in probes]
    np.testing.assert_allclose(result.mean, np.mean(forms), rtol=1e-10)
    np.testing.assert_allclose(result.standard_error, np.std(forms, ddof=1) / np.sqrt(5), rtol=1e-10)


def test_xtrace_is_far_closer_where_few_eigenvalues_dominate(x64):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    h = basis @ np.diag(0.5 ** np.arange(60.0)) @ basis.T
    loss_fn = lambda w: 0.5 * w @ (h @ w)
    kwargs = {"key": jax.random.key(0), "num_probes": 16}
    plain = curvature.hessian_trace(loss_fn, jnp.zeros(60), **kwargs)
    better = curvature.hessian_trace(loss_fn, jnp.zeros(60), estimator="xtrace", **kwargs)
    assert better.standard_error < plain.standard_error / 100
    assert abs(better.mean - np.trace(h)) < 5 * better.standard_error


@pytest.mark.parametrize("num_probes", [3, 50])
def test_xtrace_with_enough_probes_is_exact(x64, num_probes):
    problem = polynomial(cubic=True)
    result = curvature.hessian_trace(
        problem.loss, problem.params, key=jax.random.key(0), num_probes=num_probes, estimator="xtrace"
    )
    np.testing.assert_allclose(result.mean, np.trace(problem.hessian_at(problem.params)), rtol=1e-12)
    assert result.standard_error < 1e-12


@settings(max_examples=20, deadline=None)
@given(diagonal=st.lists(st.floats(-100, 100), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_rademacher_is_exact_on_a_diagonal_hessian(diagonal, seed):
    with jax.enable_x64(True):
        h = jnp.array(diagonal)
        result = curvature.hessian_trace(
            lambda w, h: 0.5 * jnp.sum(h * w**2), jnp.ones(len(h)), {"h": h}, key=jax.random.key(seed), num_probes=2
        )
    np.testing.assert_allclose(result.mean, np.sum(diagonal), rtol=1e-12, atol=1e-10)
    assert result.standard_error < 1e-10


def test_early_stop_is_the_first_probe_that_is_precise_enough(x64):
    case = dense_case()
    kwargs = {"key": jax.random.key(2), "num_probes": 400}
    data = cut(case.batch, [20, 12])
    stopped = curvature.hessian_trace(mlp_loss, case.params, data, relative_standard_error=0.05, **kwargs)
    assert 10 <= stopped.num_probes < 400
    assert stopped.standard_error <= 0.05 * abs(stopped.mean)
    never = curvature.hessian_trace(
        mlp_loss, case.params, data, relative_standard_error=0.0, **kwargs | {"num_probes": 12}
    )
    assert never.num_probes == 12
    zero = curvature.hessian_trace(jnp.sum, jnp.ones(3), relative_standard_error=0.1, **kwargs)
    assert zero == (0.0, 0.0, 10)


def test_normalized_trace_is_the_quotient_with_its_error(x64):
    case = dense_case()
    args, kwargs = (mlp_loss, case.params, cut(case.batch, [8, 24])), {"key": jax.random.key(0), "num_probes": 8}
    result = curvature.normalized_hessian_trace(*args, **kwargs)
    assert result.trace == curvature.hessian_trace(*args, **kwargs)
    norm = np.linalg.norm(case.gradient)
    np.testing.assert_allclose(result.gradient_norm, norm, rtol=1e-12)
    np.testing.assert_allclose(result.mean, result.trace.mean / norm, rtol=1e-12)
    np.testing.assert_allclose(result.standard_error, result.trace.standard_error / norm, rtol=1e-12)


def test_normalized_trace_at_a_stationary_point_is_infinite():
    result = curvature.normalized_hessian_trace(lambda w: jnp.sum(w**2), jnp.zeros(2), key=jax.random.key(0))
    assert result.mean == np.inf


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_probes": 1}, "num_probes must be at least 2"),
        ({"estimator": "hutchinson"}, "'rademacher', 'gaussian', 'xtrace'"),
        ({"relative_standard_error": -0.1}, "not negative"),
        ({"relative_standard_error": 0.1, "estimator": "xtrace"}, "XTrace"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        curvature.hessian_trace(jnp.sum, jnp.ones(2), key=jax.random.key(0), **kwargs)
