"""The approximation ratio against its definition, written out example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import curvature
from tests.core.curvature_problems import cut, dense_case, example_losses


def linear_losses(w, batch):
    return batch @ w


@pytest.mark.parametrize("perturbation", ["batch", "example"])
def test_ratio_is_one_on_a_linear_loss(x64, perturbation):
    rng = np.random.default_rng(0)
    examples = jnp.asarray(rng.normal(size=(20, 3)))
    data = [{"batch": examples[:5]}, {"batch": examples[5:]}]
    result = curvature.approximation_ratio(
        linear_losses, jnp.ones(3), data, rho=0.4, perturbation=perturbation, threshold=0.0
    )
    np.testing.assert_allclose(result.one_step, result.multi_step, rtol=1e-9)
    np.testing.assert_allclose([result.mean_of_ratios, result.ratio_of_means], 1.0, rtol=1e-9)
    assert result.standard_error < 1e-9
    assert result.ratio_of_means_standard_error < 1e-9
    assert (result.num_examples, result.num_excluded) == (20, 0)
    if perturbation == "example":
        np.testing.assert_allclose(result.one_step, 0.4 * np.linalg.norm(examples, axis=1), rtol=1e-9)


def by_hand(params, batch, rho, num_steps, step_size):
    """aᵢ and bᵢ for one set of examples, in plain jax."""
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    losses = jax.jit(lambda w: example_losses(unravel(w), batch))
    gradient = jax.jit(jax.grad(lambda w: jnp.mean(losses(w))))
    direction = lambda w: gradient(w) / jnp.linalg.norm(gradient(w))
    far = jnp.zeros_like(vector)
    for _ in range(num_steps):
        far = far + step_size * direction(vector + far)
        far = far * min(1.0, rho / float(jnp.linalg.norm(far)))
    here = losses(vector)
    return np.asarray(losses(vector + rho * direction(vector)) - here), np.asarray(losses(vector + far) - here)


@pytest.mark.parametrize("perturbation", ["batch", "example"])
@pytest.mark.parametrize("step_size", [None, 0.3])
def test_agrees_with_the_definition(x64, perturbation, step_size):
    case, rho, num_steps = dense_case(examples=7), 0.5, 4
    data = cut(case.batch, [3, 4])
    result = curvature.approximation_ratio(
        example_losses, case.params, data,
        rho=rho, num_steps=num_steps, step_size=step_size, perturbation=perturbation, threshold=0.5,
    )  # fmt: skip
    groups = data if perturbation == "batch" else cut(case.batch, [1] * 7)
    parts = [by_hand(case.params, g["batch"], rho, num_steps, step_size or rho / num_steps) for g in groups]
    a, b = (np.concatenate(part) for part in zip(*parts, strict=True))
    np.testing.assert_allclose(result.one_step, a, rtol=1e-9)
    np.testing.assert_allclose(result.multi_step, b, rtol=1e-9)
    kept = np.abs(b) > 0.5 * np.abs(b).mean()
    ratios = a[kept] / b[kept]
    np.testing.assert_allclose(result.mean_of_ratios, ratios.mean(), rtol=1e-9)
    np.testing.assert_allclose(result.standard_error, ratios.std(ddof=1) / np.sqrt(len(ratios)), rtol=1e-9)
    np.testing.assert_allclose(result.ratio_of_means, a.sum() / b.sum(), rtol=1e-9)
    assert result.num_excluded == np.sum(~kept)


def test_error_of_the_ratio_of_means_agrees_with_the_bootstrap(x64):
    case = dense_case(examples=200)
    result = curvature.approximation_ratio(example_losses, case.params, {"batch": case.batch}, rho=1.0, num_steps=3)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 200, size=(2000, 200))
    spread = (result.one_step[draws].sum(axis=1) / result.multi_step[draws].sum(axis=1)).std()
    np.testing.assert_allclose(result.ratio_of_means_standard_error, spread, rtol=0.2)


def test_examples_that_do_not_change_are_left_out_and_counted():
    examples = jnp.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    result = curvature.approximation_ratio(linear_losses, jnp.ones(2), {"batch": examples}, rho=0.1, threshold=0.0)
    assert result.num_excluded == 1
    assert result.num_examples == 3
    np.testing.assert_allclose(result.mean_of_ratios, 1.0, rtol=1e-6)
    flat_everywhere = curvature.approximation_ratio(linear_losses, jnp.ones(2), {"batch": 0 * examples}, rho=0.1)
    assert flat_everywhere.num_excluded == 3
    assert np.isnan(flat_everywhere.mean_of_ratios)
    assert np.isnan(flat_everywhere.ratio_of_means)


def test_the_perturbation_of_the_batch_depends_on_the_batch(x64):
    case = dense_case()
    whole = curvature.approximation_ratio(example_losses, case.params, cut(case.batch, [32]), rho=0.1)
    parts = curvature.approximation_ratio(example_losses, case.params, cut(case.batch, [16, 16]), rho=0.1)
    np.testing.assert_allclose(np.mean(whole.one_step), 0.1 * np.linalg.norm(case.gradient), rtol=0.2)
    assert np.mean(parts.one_step) > np.mean(whole.one_step)
    own = curvature.approximation_ratio(
        example_losses, case.params, cut(case.batch, [20, 12]), rho=0.1, perturbation="example"
    )
    alone = curvature.approximation_ratio(example_losses, case.params, cut(case.batch, [1] * 32), rho=0.1)
    np.testing.assert_allclose(own.one_step, alone.one_step, rtol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"perturbation": "all"}, ValueError, "'batch', 'example'"),
        ({"threshold": -1.0}, ValueError, "threshold"),
        ({"rho": 0.0}, ValueError, "rho must be positive"),
        ({"example_losses_fn": lambda w, batch: jnp.mean(batch @ w)}, TypeError, "loss of each example"),
        ({"data": {"images": jnp.ones((2, 2))}}, TypeError, "needs 'batch'"),
        ({"data": []}, ValueError, "no batch"),
    ],
)
def test_bad_input_is_refused(kwargs, error, message):
    arguments = {"example_losses_fn": linear_losses, "data": {"batch": jnp.ones((2, 2))}, "rho": 0.1} | kwargs
    loss_fn, data = arguments.pop("example_losses_fn"), arguments.pop("data")
    with pytest.raises(error, match=message):
        curvature.approximation_ratio(loss_fn, jnp.ones(2), data, **arguments)
