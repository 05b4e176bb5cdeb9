"""Measures of params that are sharded over an explicit mesh: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crsam_jax import curvature, landscape

LAYOUTS = {
    "rows": {"kernel": P("data", None), "bias": P(), "second": P("data", None)},
    "columns": {"kernel": P(None, "data"), "bias": P("data"), "second": P(None, "data")},
    "mixed": {"kernel": P("data", None), "bias": P("data"), "second": P(None, "data")},
}


def outputs_fn(params, batch):
    if jax.sharding.get_abstract_mesh().axis_names:  # gathers its own weights, as FSDP does
        params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    return jnp.tanh(batch @ params["kernel"] + params["bias"]) @ params["second"]


LOSS = curvature.Composed(outputs_fn, lambda outputs, batch: jnp.mean(outputs**2, axis=1))
KEY = jax.random.key(0)
MEASURES = {
    "gradient norm": lambda *args: curvature.gradient_norm(*args),
    "product": lambda loss, params, data: curvature.hessian_vector_product(
        loss, params, jax.tree.map(lambda leaf: np.cos(np.asarray(leaf)), params), data
    ),
    "trace": lambda *args: curvature.hessian_trace(*args, key=KEY, num_probes=3)[:2],
    "trace by group": lambda *args: curvature.hessian_trace_by_group(*args, key=KEY, num_probes=3)["kernel"].mean,
    "gaussian": lambda *args: curvature.hessian_trace(*args, key=KEY, num_probes=3, estimator="gaussian")[:2],
    "xtrace": lambda *args: curvature.hessian_trace(*args, key=KEY, num_probes=3, estimator="xtrace")[:2],
    "all of the diagonal": lambda *args: curvature.hessian_trace(
        *args, key=KEY, num_probes=3, estimator="xtrace", mask={"kernel": False, "bias": True, "second": False}
    ),
    "gauss-newton": lambda *args: curvature.top_eigenvalues(*args, key=KEY, num_steps=9, matrix="gauss_newton").values,
    "fisher": lambda *args: curvature.hessian_trace(*args, key=KEY, num_probes=2, matrix="empirical_fisher").mean,
    "smallest": lambda *args: curvature.smallest_eigenvalues(*args, key=KEY, num_steps=9).values,
    "spectrum": lambda *args: curvature.hessian_spectrum(*args, key=KEY, num_probes=2, num_steps=4).nodes,
    "worst": lambda *args: curvature.worst_case_sharpness(*args, rho=0.3, num_steps=3).losses,
    "worst, adaptive": lambda *args: curvature.worst_case_sharpness(*args, rho=0.3, num_steps=3, adaptive=True).losses,
    "average": lambda *args: curvature.average_sharpness(*args, sigma=0.1, key=KEY, num_probes=2)[:2],
    "ratio": lambda loss, params, data: (
        curvature.approximation_ratio(loss.example_losses, params, data, rho=0.1, num_steps=3).one_step
    ),
    "ratio by example": lambda loss, params, data: (
        curvature.approximation_ratio(
            loss.example_losses, params, data, rho=0.1, num_steps=3, perturbation="example"
        ).multi_step
    ),
    "eigenvector": lambda *args: landscape.line(
        *args[:2], curvature.top_eigenvalues(*args, key=KEY, num_steps=12).vectors[0], [-1.0, 1.0], args[2]
    ).sum(),
    "filters": lambda loss, params, data: landscape.surface(
        loss, params, landscape.filter_normalized_directions(params, KEY), [-0.1, 0.1], [0.2], data, chunk_size=2
    ),
    "orthonormalized": lambda *args: landscape.line(
        *args[:2], landscape.orthonormalized([args[1], landscape.gradient_direction(*args)])[1], [1.0], args[2]
    ),
    "plane": lambda loss, params, data: (
        landscape.plane_through(params, jax.tree.map(jnp.sin, params), jax.tree.map(jnp.cos, params)).coordinates
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_sharded_params_give_the_numbers_of_one_device(name):
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    rng = np.random.default_rng(0)
    params = {
        key: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for key, shape in (("kernel", (4, 6)), ("bias", (6,)), ("second", (6, 4)))
    }
    batch = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    expected = MEASURES[name](LOSS, params, {"batch": batch})
    mesh = jax.make_mesh((2,), ("data",))
    layouts = LAYOUTS if name in ("trace", "smallest", "filters") else {"mixed": LAYOUTS["mixed"]}
    with jax.set_mesh(mesh):
        for layout, specs in layouts.items():
            sharded = {key: jax.device_put(leaf, NamedSharding(mesh, specs[key])) for key, leaf in params.items()}
            parts = P() if layout == "rows" else P("data", None)  # of the examples
            data = {"batch": jax.device_put(batch, NamedSharding(mesh, parts))}
            found = MEASURES[name](LOSS, sharded, data)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-3, atol=2e-5, err_msg=layout)
