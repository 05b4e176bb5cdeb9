"""Blocks of the Hessian, by mask and by group, and the Gauss-Newton and Fisher matrices, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from crsam_jax import curvature
from tests.core.curvature_problems import cut, dense_case
from tests.core.problems import flat, mlp_loss


def logits_fn(params, batch):
    x, _ = batch
    return jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"]) @ params["second"]["kernel"]


def losses_fn(logits, batch):
    _, labels = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


COMPOSED = curvature.Composed(logits_fn, losses_fn)


def small_case():
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (3, 4), "bias": (4,)}, "second": {"kernel": (4, 2)}}
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
    batch = (jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.integers(0, 2, 20)))
    return params, batch


def dense_matrices(params, batch):
    w, unravel = ravel_pytree(params)
    logits = lambda w: logits_fn(unravel(w), batch)
    j = np.asarray(jax.jacobian(logits)(w))  # [examples, outputs, n]
    p = np.asarray(jax.nn.softmax(logits(w)))
    curved = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]
    g = np.asarray(jax.jacobian(lambda w: losses_fn(logits(w), batch))(w))
    return {
        "hessian": np.asarray(jax.hessian(lambda w: losses_fn(logits(w), batch).mean())(w)),
        "gauss_newton": np.einsum("eon,eop,epm->nm", j, curved, j) / len(p),
        "empirical_fisher": g.T @ g / len(p),
    }


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_each_matrix_is_its_dense_form(x64, matrix):
    params, batch = small_case()
    dense = dense_matrices(params, batch)[matrix]
    data = cut(batch, [9, 11])
    vector = jax.tree.map(jnp.sin, params)
    product = getattr(curvature, f"{matrix}_vector_product")(COMPOSED, params, vector, data)
    np.testing.assert_allclose(flat(product), dense @ flat(vector), rtol=1e-9, atol=1e-12)

    objective = curvature.Objective(COMPOSED, params, data)
    kwargs = {"key": jax.random.key(0), "matrix": matrix}
    eigenvalues = np.linalg.eigvalsh(dense)
    top = objective.top_eigenvalues(num_eigenvalues=2, num_steps=24, **kwargs)
    np.testing.assert_allclose(top.values, eigenvalues[::-1][:2], rtol=1e-6)
    bottom = objective.smallest_eigenvalues(num_steps=24, **kwargs)
    np.testing.assert_allclose(bottom.values, eigenvalues[:1], rtol=1e-5, atol=1e-9)
    trace = objective.hessian_trace(estimator="xtrace", num_probes=12, **kwargs)
    np.testing.assert_allclose(trace.mean, np.trace(dense), rtol=1e-9)
    spectrum = objective.hessian_spectrum(num_steps=4, num_probes=2, **kwargs)
    assert spectrum.nodes.max() <= eigenvalues[-1] + 1e-9


def test_products_with_a_plain_loss_say_what_is_missing():
    case = dense_case()
    with pytest.raises(TypeError, match="Composed"):
        curvature.hessian_trace(
            mlp_loss, case.params, {"batch": case.batch}, key=jax.random.key(0), matrix="gauss_newton"
        )
    with pytest.raises(ValueError, match="'hessian', 'gauss_newton', 'empirical_fisher'"):
        curvature.hessian_trace(mlp_loss, case.params, {"batch": case.batch}, key=jax.random.key(0), matrix="fisher")


def test_a_mask_measures_the_diagonal_block(x64):
    params, batch = small_case()
    dense = dense_matrices(params, batch)["hessian"]
    mask = {"first": True, "second": False}
    block = dense[:16, :16]  # bias and kernel of the first layer
    args, kwargs = (COMPOSED, params, {"batch": batch}), {"key": jax.random.key(0), "mask": mask}
    eigenvalues = np.linalg.eigvalsh(block)
    pairs = curvature.top_eigenvalues(*args, num_steps=16, **kwargs)
    np.testing.assert_allclose(pairs.values, eigenvalues[-1:], rtol=1e-6)
    np.testing.assert_array_equal(pairs.vectors[0]["second"]["kernel"], 0)
    bottom = curvature.smallest_eigenvalues(*args, num_steps=16, **kwargs)
    np.testing.assert_allclose(bottom.values, eigenvalues[:1], rtol=1e-5)
    trace = curvature.hessian_trace(*args, estimator="xtrace", **kwargs)
    np.testing.assert_allclose(trace.mean, np.trace(block), rtol=1e-9)
    spectrum = curvature.hessian_spectrum(*args, num_probes=2, **kwargs)
    assert spectrum.nodes.shape == (2, 16)
    gradient = jax.grad(lambda params: COMPOSED(params, batch=batch))(params)
    norm = curvature.gradient_norm(*args, mask=lambda params: mask)
    np.testing.assert_allclose(norm, np.linalg.norm(flat(gradient["first"])), rtol=1e-9)


def test_a_callable_tree_of_bools_is_a_mask():
    @jax.tree_util.register_pytree_node_class
    class Module(dict):
        def __call__(self, x):
            return True

        def tree_flatten(self):
            return [self["a"], self["b"]], None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(a=leaves[0], b=leaves[1])

    params = Module(a=jnp.ones(1), b=jnp.full(1, 2.0))
    loss_fn = lambda p: jnp.sum(p["a"] * 3 + p["b"] * 4)
    assert curvature.gradient_norm(loss_fn, params, mask=Module(a=True, b=False)) == 3


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"first": 1, "second": True}, TypeError, "True and False"),
        ({"first": True}, ValueError, "prefix of params"),
        (False, ValueError, "keeps no leaf"),
    ],
)
def test_bad_masks_are_refused(mask, error, message):
    params = {"first": jnp.ones(2), "second": jnp.ones(3)}
    with pytest.raises(error, match=message):
        curvature.gradient_norm(lambda p: p["first"].sum(), params, mask=mask)


def test_traces_by_group_are_those_of_the_blocks(x64):
    params, batch = small_case()
    dense = dense_matrices(params, batch)["hessian"]
    args = (COMPOSED, params, {"batch": batch})
    calls = []
    traces = curvature.hessian_trace_by_group(
        *args, key=jax.random.key(0), num_probes=400, progress=lambda *call: calls.append(call)
    )
    assert len(calls) == 400
    assert list(traces) == ["first", "second"]
    for block, found in ((dense[:16, :16], traces["first"]), (dense[16:, 16:], traces["second"])):
        assert abs(found.mean - np.trace(block)) < 4 * found.standard_error
    whole = curvature.hessian_trace(*args, key=jax.random.key(0), num_probes=400)
    np.testing.assert_allclose(sum(t.mean for t in traces.values()), whole.mean, rtol=1e-9)
    kernels = lambda path: "kernels" if path.endswith("kernel") else None
    chosen = curvature.hessian_trace_by_group(*args, key=jax.random.key(0), group_of=kernels, num_probes=2)
    assert list(chosen) == ["kernels"]


def test_groups_of_flat_names_are_those_of_the_nested_tree():
    nested = {"attn": {"query": {"kernel": 1.0, "bias": 1.0}}, "head": {"kernel": 1.0}}
    flat_names = {"attn/query/kernel": 1.0, "attn/query/bias": 1.0, "head.kernel": 1.0}
    assert list(curvature.parameter_groups(nested)) == list(curvature.parameter_groups(flat_names))
    with pytest.raises(ValueError, match="No parameter is in a group"):
        curvature.parameter_groups(nested, lambda path: None)


def test_a_plot_has_a_bar_for_each_group():
    pytest.importorskip("matplotlib")
    axes = curvature.plot_by_group({"a": curvature.Estimate(2.0, 0.5, 4), "b": 1.0}, label="trace")
    assert [bar.get_width() for bar in axes.containers[1].patches] == [2.0, 1.0]
    assert axes.get_xlabel() == "trace"


def test_an_objective_says_its_arguments_once():
    params, batch = small_case()
    objective = curvature.Objective(COMPOSED, params, {"batch": batch})
    key = jax.random.key(0)
    args = (COMPOSED, params, {"batch": batch})
    assert objective.gradient_norm() == curvature.gradient_norm(*args)
    assert objective.normalized_hessian_trace(key=key, num_probes=3) == curvature.normalized_hessian_trace(
        *args, key=key, num_probes=3
    )
    assert objective.worst_case_sharpness(rho=0.1).value == curvature.worst_case_sharpness(*args, rho=0.1).value
    assert objective.average_sharpness(sigma=0.1, key=key) == curvature.average_sharpness(*args, sigma=0.1, key=key)
    np.testing.assert_allclose(objective.value(), COMPOSED(params, batch=batch), rtol=1e-6)
    with pytest.raises(TypeError, match="must be callable"):
        curvature.Objective(3, params)
