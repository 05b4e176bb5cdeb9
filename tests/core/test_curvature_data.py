"""What the measures take as data: one batch or many, of any sizes, and clear errors for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crsam_jax import curvature, landscape
from crsam_jax.curvature import Batches
from crsam_jax.curvature._mean_loss import MeanLoss
from tests.core.curvature_problems import cut, dense_case, example_losses
from tests.core.problems import flat, mlp_loss

CUTS = ([32], [16, 16], [1, 30, 1], [5, 9, 18])


@pytest.mark.parametrize("sizes", CUTS)
def test_mean_loss_does_not_depend_on_the_cut(x64, sizes):
    case = dense_case()
    vector = jax.tree.map(jnp.cos, case.params)
    whole = MeanLoss(mlp_loss, {"batch": case.batch}, False, None)
    parts = MeanLoss(mlp_loss, cut(case.batch, sizes), False, None)
    np.testing.assert_allclose(parts.value(case.params), whole.value(case.params), rtol=1e-13)
    np.testing.assert_allclose(flat(parts.gradient(case.params)), case.gradient, rtol=1e-10, atol=1e-14)
    leaves = tuple(jax.tree.leaves(vector))
    product = parts.hvp(case.params, leaves, (True,) * len(leaves))
    np.testing.assert_allclose(flat(product), case.hessian @ flat(vector), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sizes", [CUTS[-1]])
def test_every_measure_agrees_with_the_whole_batch(x64, sizes):
    case, key = dense_case(), jax.random.key(0)
    measures = {
        "gradient_norm": lambda data: curvature.gradient_norm(mlp_loss, case.params, data),
        "trace": lambda data: curvature.hessian_trace(mlp_loss, case.params, data, key=key, num_probes=2)[:2],
        "xtrace": lambda data: curvature.hessian_trace(
            mlp_loss, case.params, data, key=key, num_probes=4, estimator="xtrace"
        )[:2],
        "eigenvalues": lambda data: curvature.top_eigenvalues(mlp_loss, case.params, data, key=key, num_steps=9).values,
        "spectrum": lambda data: (
            curvature.hessian_spectrum(mlp_loss, case.params, data, key=key, num_probes=2, num_steps=5).density
        ),
        "worst": lambda data: curvature.worst_case_sharpness(mlp_loss, case.params, data, rho=0.1, num_steps=3).losses,
        "average": lambda data: curvature.average_sharpness(
            mlp_loss, case.params, data, sigma=0.1, key=key, num_probes=2
        ),
        "line": lambda data: landscape.line(mlp_loss, case.params, case.params, [-0.5, 0.0, 0.5], data),
    }
    for name, measure in measures.items():
        expected, found = measure({"batch": case.batch}), measure(cut(case.batch, sizes))
        np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)


def test_example_count_weighs_padded_batches(x64):
    case = dense_case()

    def masked_loss(params, batch, mask):
        return jnp.sum(example_losses(params, batch) * mask) / jnp.sum(mask)

    padded = [
        {"batch": jax.tree.map(lambda leaf: jnp.resize(leaf[start : start + 20], (20, *leaf.shape[1:])), case.batch),
         "mask": jnp.arange(20) < 32 - start}
        for start in (0, 20)
    ]  # fmt: skip
    found = curvature.gradient_norm(masked_loss, case.params, padded, example_count=lambda b: np.sum(b["mask"]))
    np.testing.assert_allclose(found, np.linalg.norm(case.gradient), rtol=1e-12)


def test_batches_cut_arrays_and_carry_fixed_arguments(x64):
    case = dense_case()

    def loss_fn(params, x, labels, temperature):
        return mlp_loss(params, (x, labels)) / temperature, {"aux": None}

    arrays = {"x": np.asarray(case.batch[0]), "labels": np.asarray(case.batch[1])}
    batches = Batches(arrays, batch_size=10, fixed={"temperature": jnp.array([2.0])[0]})
    assert [len(batch["labels"]) for batch in batches] == [10, 10, 10, 2]
    assert len(batches) == 4
    found = curvature.gradient_norm(loss_fn, case.params, batches, has_aux=True)
    np.testing.assert_allclose(found, np.linalg.norm(case.gradient) / 2, rtol=1e-12)


def test_one_compilation_serves_many_params_and_equal_batches():
    traces = []

    def loss_fn(w, batch):
        traces.append(batch.shape)
        return jnp.mean((batch @ w) ** 2)

    data = Batches({"batch": np.ones((6, 2), np.float32)}, batch_size=3)
    for scale in (1.0, 2.0, 3.0):
        curvature.hessian_trace(loss_fn, scale * jnp.ones(2), data, key=jax.random.key(0), num_probes=2)
    assert traces == [(3, 2)]


def test_half_precision_params_are_measured_in_float32():
    loss_fn = lambda w: jnp.sum(w**4)
    trace = curvature.hessian_trace(loss_fn, jnp.full(3, 1.5, jnp.bfloat16), key=jax.random.key(0), num_probes=2)
    assert trace.mean == 3 * 12 * 1.5**2
    product = curvature.hessian_vector_product(loss_fn, jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    assert product.dtype == jnp.float32


class Unsized:
    """Starts afresh each time, but does not know its length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_progress_counts_to_its_total():
    case, key = dense_case(), jax.random.key(0)
    data = cut(case.batch, [16, 16])
    args = (mlp_loss, case.params, data)
    measures = {
        3: lambda seen: curvature.hessian_trace(*args, key=key, num_probes=3, progress=seen),
        8: lambda seen: curvature.hessian_trace(*args, key=key, num_probes=4, estimator="xtrace", progress=seen),
        7: lambda seen: curvature.top_eigenvalues(*args, key=key, num_eigenvalues=2, num_steps=5, progress=seen),
        6: lambda seen: curvature.hessian_spectrum(*args, key=key, num_probes=2, num_steps=3, progress=seen),
        5: lambda seen: curvature.worst_case_sharpness(*args, rho=0.1, num_steps=4, progress=seen),
        2: lambda seen: curvature.approximation_ratio(example_losses, case.params, data, rho=0.1, progress=seen),
        4: lambda seen: landscape.line(mlp_loss, case.params, case.params, [0.0, 1.0], data, progress=seen),
    }
    for total, measure in measures.items():
        calls = []
        measure(lambda done, total, calls=calls: calls.append((done, total)))
        assert calls == [(i + 1, total) for i in range(total)]
    calls = []
    landscape.line(*args[:2], case.params, [0.0], Unsized(data), progress=lambda *call: calls.append(call))
    assert calls == [(1, None), (2, None)]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (({"batch": jnp.ones((2, 2))} for _ in range(2)), TypeError, "iterator.*used up after one pass"),
        ([], ValueError, "no batch"),
        ([(jnp.ones((2, 2)), jnp.ones(2))], TypeError, "must map argument names"),
        (3, TypeError, "mapping of arguments or an iterable"),
        ([{"batch": (jnp.ones((2, 2)), jnp.ones(3))}], ValueError, "number of examples is not clear"),
        ([{"batch": jnp.ones(())}], ValueError, "number of examples is not clear"),
        ({"bacth": jnp.ones((2, 2))}, TypeError, "needs 'batch'.*Did you mean"),
        (None, TypeError, "needs 'batch'"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        curvature.gradient_norm(lambda w, batch: jnp.mean(batch[0] @ w), jnp.ones(2), data)


def test_bad_counts_are_refused():
    data = [{"batch": jnp.ones((2, 2))}]
    loss_fn = lambda w, batch: jnp.mean(batch @ w)
    for count, message in ((0, "holds no example"), (-1, "not negative"), (float("nan"), "finite")):
        with pytest.raises(ValueError, match=message):
            curvature.gradient_norm(loss_fn, jnp.ones(2), data, example_count=lambda batch, count=count: count)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        Batches({"x": np.ones((2, 2))}, 0)
    with pytest.raises(ValueError, match="both arrays and fixed"):
        Batches({"x": np.ones((2, 2))}, 1, {"x": 1})
    with pytest.raises(ValueError, match="number of examples"):
        Batches({"x": np.ones((2, 2)), "y": np.ones(3)}, 1)


def test_bad_losses_and_params_are_refused():
    with pytest.raises(TypeError, match="has_aux=True"):
        curvature.gradient_norm(lambda w: (jnp.sum(w), 1), jnp.ones(2))
    with pytest.raises(TypeError, match="scalar"):
        curvature.gradient_norm(lambda w: w, jnp.ones(2))
    with pytest.raises(TypeError, match="int32"):
        curvature.gradient_norm(lambda w: jnp.sum(w), jnp.ones(2, jnp.int32))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda w: curvature.gradient_norm(jnp.sum, w))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"vector has shape \(3,\) at the root"):
        curvature.hessian_vector_product(jnp.sum, jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="tree structure"):
        curvature.hessian_vector_product(jnp.sum, jnp.ones(2), [jnp.ones(2)])
