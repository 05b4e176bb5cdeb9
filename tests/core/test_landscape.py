"""Directions and slices: norms and angles as they should be, invariance under rescaling, values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crsam_jax import curvature, landscape
from tests.core.curvature_problems import cut, dense_case
from tests.core.problems import flat, mlp_loss, polynomial


def convolutional_params():
    rng = np.random.default_rng(0)
    return {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4))),
        "dense": jnp.asarray(rng.normal(size=(5, 7))),
        "scale": jnp.asarray(rng.normal(size=4)),
        "temperature": jnp.asarray(1.5),
    }


def filters(leaf):
    return np.asarray(leaf).reshape(-1, leaf.shape[-1]).T


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_filter_has_its_norm_and_directions_are_orthogonal_in_each(seed):
    with jax.enable_x64(True):
        params = convolutional_params()
        directions = landscape.filter_normalized_directions(params, jax.random.key(seed), 3)
    for name in ("conv", "dense"):
        per_filter = np.stack([filters(d[name]) for d in directions], axis=1)  # [filters, directions, weights]
        gram = per_filter @ per_filter.transpose(0, 2, 1)
        expected = np.sum(filters(params[name]) ** 2, axis=1)[:, None, None] * np.eye(3)
        np.testing.assert_allclose(gram, expected, atol=1e-11)
    for direction in directions:
        np.testing.assert_array_equal(direction["scale"], 0)
        np.testing.assert_array_equal(direction["temperature"], 0)


def test_vectors_may_be_scaled_as_one_filter(x64):
    params = convolutional_params()
    first, second = landscape.filter_normalized_directions(params, jax.random.key(0), vectors="scale")
    for direction in (first, second):
        np.testing.assert_allclose(np.linalg.norm(direction["scale"]), np.linalg.norm(params["scale"]), rtol=1e-12)
    np.testing.assert_allclose(first["scale"] @ second["scale"], 0, atol=1e-12)
    assert abs(first["temperature"]) == 1.5
    assert second["temperature"] == 0  # one number has room for one direction only


def test_a_filter_of_zeros_stays(x64):
    directions = landscape.filter_normalized_directions({"w": jnp.zeros((3, 2))}, jax.random.key(0))
    np.testing.assert_array_equal(flat(directions), 0)


def relu_loss(params, batch):
    x, y = batch
    hidden = jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"])
    return jnp.mean((hidden @ params["second"]["w"] - y) ** 2)


def test_filter_normalized_slices_do_not_change_under_relu_rescaling(x64):
    rng = np.random.default_rng(0)
    first = {"w": jnp.asarray(rng.normal(size=(4, 6))), "b": jnp.asarray(rng.normal(size=6))}
    params = {"first": first, "second": {"w": jnp.asarray(rng.normal(size=(6, 2)))}}
    rescaled = {
        "first": jax.tree.map(lambda leaf: 7.0 * leaf, first),
        "second": {"w": params["second"]["w"] / 7.0},
    }
    data = {"batch": (jnp.asarray(rng.normal(size=(16, 4))), jnp.asarray(rng.normal(size=(16, 2))))}
    xs, ys = np.linspace(-1, 1, 4), np.linspace(-0.5, 1, 3)

    def slice_of(params):
        directions = landscape.filter_normalized_directions(params, jax.random.key(3))
        return landscape.surface(relu_loss, params, directions, xs, ys, data)

    np.testing.assert_allclose(slice_of(rescaled), slice_of(params), rtol=1e-10)
    plain = jax.tree.map(jnp.cos, params)
    before, after = (landscape.line(relu_loss, p, plain, xs, data) for p in (params, rescaled))
    assert np.max(np.abs(after / before - 1)) > 0.1  # which slices along a fixed direction do


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_orthonormalized_directions_span_the_same_space(seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        trees = [{"a": rng.normal(size=(2, 3)), "b": rng.normal(size=2)} for _ in range(3)]
        found = landscape.orthonormalized(trees)
    basis, original = (np.stack([flat(tree) for tree in group]) for group in (found, trees))
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(original @ basis.T @ basis, original, atol=1e-11)


def test_dependent_directions_are_refused():
    tree = {"a": jnp.arange(3.0)}
    for others in ([tree, tree], [{"a": jnp.zeros(3)}], [tree, {"a": jnp.full(3, jnp.nan)}]):
        with pytest.raises(ValueError, match="zero, not finite, or lies in the span"):
            landscape.orthonormalized(others)


def test_a_plane_passes_through_its_three_points(x64):
    case = dense_case()
    points = [jax.tree.map(lambda leaf, i=i: jnp.sin(i + 3 * leaf), case.params) for i in range(3)]
    plane = landscape.plane_through(*points)
    for point, (x, y) in zip(points, plane.coordinates, strict=True):
        there = jax.tree.map(lambda o, a, b, x=x, y=y: o + x * a + y * b, plane.origin, *plane.directions)
        np.testing.assert_allclose(flat(there), flat(point), atol=1e-12)
        loss = landscape.surface(mlp_loss, plane.origin, plane.directions, [x], [y], {"batch": case.batch})
        np.testing.assert_allclose(loss, [[mlp_loss(point, case.batch)]], rtol=1e-12)


def test_axes_of_gradient_and_top_eigenvector(x64):
    case = dense_case()
    data = cut(case.batch, [12, 20])
    gradient = landscape.gradient_direction(mlp_loss, case.params, data)
    np.testing.assert_allclose(flat(gradient), case.gradient / np.linalg.norm(case.gradient), rtol=1e-9, atol=1e-14)
    top = curvature.top_eigenvalues(mlp_loss, case.params, data, key=jax.random.key(0), num_steps=50).vectors[0]
    axes = landscape.orthonormalized([gradient, top])
    assert landscape.surface(mlp_loss, case.params, axes, [0.0, 0.1], [0.0], data).shape == (1, 2)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("sizes", [None, [32], [5, 27]])
def test_surface_is_the_loss_at_each_point(x64, chunk_size, sizes):
    case = dense_case()
    data = {"batch": case.batch} if sizes is None else cut(case.batch, sizes)
    axes = landscape.filter_normalized_directions(case.params, jax.random.key(0))
    xs, ys = [-1.0, 0.0, 0.5], [0.0, 2.0]
    found = landscape.surface(mlp_loss, case.params, axes, xs, ys, data, chunk_size=chunk_size)
    at = lambda x, y: mlp_loss(jax.tree.map(lambda w, a, b: w + x * a + y * b, case.params, *axes), case.batch)
    np.testing.assert_allclose(found, [[float(at(x, y)) for x in xs] for y in ys], rtol=1e-12)


def test_second_difference_of_a_line_is_the_curvature_along_it(x64):
    problem = polynomial(cubic=False)
    direction = jax.tree.map(jnp.cos, problem.params)
    low, middle, high = landscape.line(problem.loss, problem.params, direction, [-0.5, 0.0, 0.5])
    v = flat(direction)
    np.testing.assert_allclose((low + high - 2 * middle) / 0.25, v @ problem.hessian @ v, rtol=1e-10)


def test_points_where_the_loss_is_not_finite_stay_so():
    losses = landscape.line(lambda w: jnp.log(w), jnp.array(1.0), jnp.array(1.0), [-2.0, 0.0])
    assert np.isnan(losses[0])
    assert losses[1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"xs": []}, "xs must be a vector"),
        ({"ys": [np.inf]}, "ys must be a vector of finite"),
        ({"directions": (jnp.ones(2),)}, "two pytrees"),
        ({"directions": (jnp.ones(2), jnp.ones(3))}, r"directions\[1\] has shape \(3,\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    given = {"directions": (jnp.ones(2), jnp.ones(2)), "xs": [0.0], "ys": [0.0]} | arguments
    with pytest.raises(ValueError, match=message):
        landscape.surface(jnp.sum, jnp.ones(2), **given)
    with pytest.raises(ValueError, match="'zero', 'scale'"):
        landscape.filter_normalized_directions(jnp.ones(2), jax.random.key(0), vectors="keep")
