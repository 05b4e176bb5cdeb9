"""Arithmetic over pytrees, against numpy in float64 on the concatenated leaves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsam_jax import _trees as _tree
from tests.core.problems import flat

TREE = {"a": jnp.array([3.0, -4.0]), "b": [jnp.array(12.0), None, jnp.array([[84.0]])]}


def test_norm_runs_over_the_whole_tree():
    assert _tree.norm(TREE) == 85.0


def test_dot_runs_over_the_whole_tree():
    assert _tree.dot(TREE, jax.tree.map(lambda x: 2 * x, TREE)) == 2 * 85**2


def test_unit_is_the_tree_over_its_norm():
    np.testing.assert_allclose(flat(_tree.unit(TREE)), flat(TREE) / 85, rtol=1e-6)


def test_cosine_of_known_angles():
    x, y = {"a": jnp.array([1.0, 0.0]), "b": jnp.array(0.0)}, {"a": jnp.array([1.0, 0.0]), "b": jnp.array(1.0)}
    assert _tree.cosine(x, y) == pytest.approx(2**-0.5)
    assert _tree.cosine(x, jax.tree.map(jnp.negative, x)) == -1
    assert _tree.cosine(x, jax.tree.map(jnp.zeros_like, x)) == 0


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_norm_and_unit_survive_squares_that_leave_the_range(scale):
    tree = {"a": jnp.full(3, scale), "b": jnp.array(scale)}
    assert _tree.norm(tree) == pytest.approx(2 * scale, rel=1e-6)
    np.testing.assert_allclose(flat(_tree.unit(tree)), 0.5, rtol=1e-6)
    assert _tree.cosine(tree, tree) == pytest.approx(1, rel=1e-6)


def test_norm_survives_the_extremes_of_float64(x64):
    for scale in (1e-300, 1e300):
        tree = {"a": jnp.full(4, scale)}
        assert tree["a"].dtype == jnp.float64
        assert float(_tree.unit(tree)["a"][0]) == pytest.approx(0.5, rel=1e-12)


@given(st.lists(st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 0.01), min_size=1, max_size=8))
def test_rescaling_changes_no_digit_in_the_ordinary_range(values):
    x = jnp.array(values, jnp.float32)
    assert _tree.norm(x) == jnp.sqrt(jnp.sum(x * x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    ones = jnp.ones(90_000, dtype)  # 90,000 is beyond float16, and bfloat16 stops counting at 256
    assert _tree.norm(ones) == 300
    assert _tree.dot(ones, ones) == 90_000
    assert _tree.norm(ones).dtype == _tree.unit(ones).dtype == jnp.float32


def test_the_widest_leaf_decides_and_float32_is_the_least(x64):
    half, double = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float64)
    assert _tree.wide_dtype({"a": half}) == jnp.float32
    assert _tree.wide_dtype({"a": half}, [double]) == jnp.float64
    assert _tree.norm([half, double]).dtype == jnp.float64
    assert _tree.wide_dtype({}) == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_elements_show_in_the_norm_and_give_no_direction(bad):
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([bad])}
    assert not jnp.isfinite(_tree.norm(tree))
    assert not _tree.all_finite(tree)
    assert not np.any(flat(_tree.unit(tree)))
    assert _tree.cosine(tree, tree) == 0


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_zero_and_subnormal_trees_give_no_direction(value):
    assert not np.any(flat(_tree.unit({"a": jnp.full(3, value)})))


def test_trees_without_elements_have_norm_zero():
    for tree in ({}, {"a": None}, {"a": jnp.zeros((0, 3))}):
        assert _tree.norm(tree) == 0
        assert _tree.all_finite(tree)
        assert _tree.cosine(tree, tree) == 0


def test_select_takes_no_harm_from_the_branch_not_taken():
    clean, dirty = {"a": jnp.array([1.0])}, {"a": jnp.array([jnp.nan])}
    assert _tree.select(jnp.array(True), clean, dirty)["a"] == 1
    assert _tree.select(jnp.array(False), dirty, clean)["a"] == 1


def test_wide_map_computes_in_float32_and_cast_like_goes_back():
    a, b = jnp.array([1.0], jnp.bfloat16), jnp.array([2.0**-12], jnp.bfloat16)
    total = _tree.wide_map(jnp.add, {"x": a}, {"x": b})
    assert total["x"] == 1 + 2.0**-12  # lost in bfloat16
    back = _tree.cast_like(total, {"x": a})["x"]
    assert back.dtype == ml_dtypes.bfloat16
    assert back == 1


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_the_compiled_norm_of_a_single_number_keeps_its_range(shape, value):
    """The compiler may not multiply the two constants of a square with each other."""
    x = jnp.full(shape, value, jnp.float32)
    length = jax.jit(_tree.scaled_norm)({"x": x})
    found = float(length.length) / float(length.scale)
    assert found == pytest.approx(value * max(x.size, 1) ** 0.5, rel=1e-6)
