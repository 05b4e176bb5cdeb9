"""A run's exported parameters, a flat dict of names, have the filters and directions of the run's own tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import landscape

NESTED = {
    "block": {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}},
    "block-2": {"attn": {"query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}}},
    "block10": {"dense": {"weight": jnp.ones((5, 2))}},
}
LISTED = {"layers": [{"kernel": jnp.full((2, 3), float(i + 1))} for i in range(12)]}


def flattened(tree, separator):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("tree", [NESTED, LISTED], ids=["nested", "listed"])
def test_filters_and_directions_of_flat_names(tree, separator):
    flat = flattened(tree, separator)
    found, expected = landscape.output_axes(flat), landscape.output_axes(tree)
    assert [found[f"['{name}']"] for name in flat] == list(expected.values())
    for of_tree, of_flat in zip(
        landscape.filter_normalized_directions(tree, jax.random.key(0), vectors="scale"),
        landscape.filter_normalized_directions(flat, jax.random.key(0), vectors="scale"),
        strict=True,
    ):
        for name, leaf in flattened(of_tree, separator).items():
            np.testing.assert_array_equal(of_flat[name], leaf, err_msg=name)


def test_a_runs_own_export():
    nnx = pytest.importorskip("flax.nnx")
    from experiments.training.checkpoints import by_path
    from tests.experiments.test_models import reduced

    _, params, _ = nnx.split(nnx.jit(lambda: reduced("vit_ti4"))(), nnx.Param, ...)
    flat = {path.removesuffix("/value"): leaf for path, leaf in by_path(params).items()}
    of_tree = landscape.filter_normalized_directions(params, jax.random.key(1))
    of_flat = landscape.filter_normalized_directions(flat, jax.random.key(1))
    for expected, found in zip(of_tree, of_flat, strict=True):
        for path, leaf in by_path(expected).items():
            np.testing.assert_array_equal(found[path.removesuffix("/value")], leaf, err_msg=path)
