"""Sharded params on explicit meshes, which `jax.make_mesh` makes by default: they trace and equal one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import crsam_jax

P = PartitionSpec
LAYOUTS = {
    "fsdp": {"hidden": P("data", None), "bias": P(), "large": P("data", None)},
    "tensor-parallel": {"hidden": P(None, "data"), "bias": P("data"), "large": P(None, "data")},
    "mixed": {"hidden": P("data", None), "bias": P("data"), "large": P(None, "data")},
    "replicated": {"hidden": P(), "bias": P(), "large": P()},
}
METHODS = {
    "sam": crsam_jax.sam,
    "asam": crsam_jax.asam,
    "rsam": crsam_jax.rsam,
    "gsam": crsam_jax.gsam,
    "wsam": crsam_jax.wsam,
    "gradient_norm_penalty": crsam_jax.gradient_norm_penalty,
    "decoupled_wsam": lambda loss: crsam_jax.decoupled_wsam(loss, optax.sgd(0.1), 0.1),
    "crsam": crsam_jax.crsam,
    "crsam, sequential": lambda loss: crsam_jax.crsam(loss, execution=crsam_jax.Execution(strategy="sequential")),
    "crsam, vmap": lambda loss: crsam_jax.crsam(loss, execution=crsam_jax.Execution(strategy="vmap")),
    "crsam, random probes": lambda loss: crsam_jax.crsam(loss, probes=crsam_jax.random_probes(2)),
    "sam, masked": lambda loss: crsam_jax.sam(loss, mask={"hidden": True, "bias": False, "large": True}),
    "sam, ascent only": lambda loss: crsam_jax.sam(loss, ascent_only=True),
    "friendly": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.friendly_ascent()),
    "momentum": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.momentum_ascent()),
    "dynamic sparse": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.dynamic_sparse_ascent(update_every=1)),
    "sparse": lambda loss: crsam_jax.sam(
        loss, ascent=crsam_jax.ascents.sparse_ascent(crsam_jax.ascents.largest_fraction(initial_params(), 0.5))
    ),
    "dropped": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.dropped_ascent()),
    "periodic": lambda loss: crsam_jax.periodic(crsam_jax.crsam(loss), 2),
    "look": lambda loss: crsam_jax.look(crsam_jax.sam(loss), 2),
    "late": lambda loss: crsam_jax.late(crsam_jax.sam(loss), 1),
    "adaptive_policy": lambda loss: crsam_jax.adaptive_policy(crsam_jax.sam(loss)),
    "stable_sam": crsam_jax.stable_sam,
    "le_sam": crsam_jax.le_sam,
    "multi_step_sam": crsam_jax.multi_step_sam,
    "functional_sam": lambda loss: crsam_jax.functional_sam(outputs_of, criterion),
    "variance suppressed": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.variance_suppressed_ascent()),
    "preconditioned": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.preconditioned_ascent()),
    "rwp": crsam_jax.rwp,
    "random weights": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.random_weight_ascent()),
    "smoothed": lambda loss: crsam_jax.sam(loss, ascent=crsam_jax.ascents.smoothed_ascent()),
    "sharpened": lambda loss: as_a_stage(crsam_jax.sharpened(loss, crsam_jax.crsam)),
    "msam": lambda loss: crsam_jax.msam(optax.sgd(0.1)),
    "s2sam": lambda loss: crsam_jax.s2sam(optax.sgd(0.1)),
}


def outputs_of(params, x):
    if jax.sharding.get_abstract_mesh().axis_names:  # gathers its own weights, as FSDP does
        params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    return jnp.tanh(x @ params["hidden"] + params["bias"]), params["large"]


def criterion(outputs):
    return sum(jnp.mean(output**2) for output in outputs)


def as_a_stage(sharp):
    """A stage that replaces the gradient by that of a sharpened loss."""
    update = lambda grads, state, params, *, loss, x: (jax.grad(sharp)(params, x), state)
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def loss_fn(params, x):
    return criterion(outputs_of(params, x))


def initial_params():
    return {
        "hidden": jnp.linspace(-1, 1, 16 * 32, dtype=jnp.float32).reshape(16, 32),
        "bias": jnp.linspace(0.1, 0.2, 32, dtype=jnp.float32),
        "large": jnp.linspace(-1, 1, 128 * 256, dtype=jnp.float32).reshape(128, 256),  # too large to be joined
    }


def two_steps(make, params, x):
    tx = optax.with_extra_args_support(make(loss_fn))

    @jax.jit
    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, loss=loss, x=x)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, x)
    return params


ON_EIGHT = ("sam", "asam", "crsam", "dynamic sparse", "look", "msam")


@pytest.mark.parametrize(
    ("name", "devices"),
    [(name, 2) for name in METHODS]
    + [(name, 1) for name in ON_EIGHT]
    + [pytest.param(name, 8, marks=pytest.mark.slow) for name in ON_EIGHT],
)
def test_sharded_params_trace_and_equal_one_device(name, devices):
    if len(jax.devices()) < devices:
        pytest.skip(f"needs {devices} devices")
    params, x = initial_params(), jnp.linspace(0, 1, 8 * 16, dtype=jnp.float32).reshape(8, 16)
    expected = two_steps(METHODS[name], params, x)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    layouts = LAYOUTS if devices == 2 else {"mixed": LAYOUTS["mixed"]}
    for layout, specs in layouts.items():
        with jax.set_mesh(mesh):
            sharded = {key: jax.device_put(leaf, NamedSharding(mesh, specs[key])) for key, leaf in params.items()}
            found = two_steps(METHODS[name], sharded, jax.device_put(x, NamedSharding(mesh, P())))
            for key, leaf in found.items():
                assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[key]), leaf.ndim), (layout, key)
                np.testing.assert_allclose(np.asarray(leaf), expected[key], rtol=1e-5, atol=1e-6, err_msg=layout)


def all_gathers(make):
    """How many arrays of at least a weight's size one training step gathers, and the largest of all others."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = optax.with_extra_args_support(make(loss_fn))

    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, loss=loss, x=x)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = jax.device_put(initial_params(), {key: NamedSharding(mesh, s) for key, s in LAYOUTS["fsdp"].items()})
        x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data")))
        text = jax.jit(step).lower(params, jax.jit(tx.init)(params), x).compile().as_text()
    return sum("all-gather(" in line or "all-gather-start(" in line for line in text.splitlines())


@pytest.mark.parametrize(("name", "evaluations"), [("sam", 2), ("asam", 2), ("gsam", 2), ("crsam", 3), ("msam", 1)])
def test_no_weight_is_gathered_but_for_an_evaluation(name, evaluations):
    """Each evaluation gathers the weights that the loss asks for; norms, products and the combination gather none."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    adam = all_gathers(lambda loss: optax.adam(1e-3))
    assert adam > 0
    chained = lambda loss: METHODS[name](loss) if name == "msam" else optax.chain(METHODS[name](loss), optax.sgd(0.1))
    assert all_gathers(chained) <= evaluations * adam


@pytest.mark.parametrize("method", [crsam_jax.sam, crsam_jax.crsam])
def test_a_forgotten_axis_name_is_named(method):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:1])
    plain = lambda w, x: jnp.mean((x @ w) ** 2)

    def gradient(w, x):
        own = jax.lax.pcast(w, "data", to="varying")
        loss, grads = jax.lax.pmean(jax.value_and_grad(plain)(own, x), "data")
        return tx.update(grads, tx.init(w), w, loss=loss, x=x)[0]

    tx = method(plain)
    step = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"mesh axis 'data'.*Execution\(axis_name='data'\)"), jax.set_mesh(mesh):
        jax.jit(step)(jnp.ones(3), jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("data"))))
