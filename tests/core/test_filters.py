"""Filters: what feeds one output unit, by the Jacobian of each library's layers, and by type in whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from flax import linen as nn
from flax import nnx

from crsam_jax import landscape
from experiments.networks.efficientnet import DepthwiseConv, PointwiseConv
from experiments.networks.network import NAMES, build
from tests.experiments.test_models import REDUCED

X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 4)), jnp.float32)
LINE = X[:, :, 0]  # [1, 5, 4]


def assert_filters_are_what_feeds_a_unit(apply, params, axes_of_output, given=None):
    """Two weights are of one filter if and only if the same units depend on them; a bias or gain has no filters.

    Args:
      apply: from params to the layer's output.
      params: of the layer.
      axes_of_output: the axes of the output that number its units.
      given: output axes by path, where the rule must be told.
    """
    axes = landscape.output_axes(params) | (given or {})
    kernels = 0
    for (path, leaf), jacobian in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(jax.jacobian(apply)(params)), strict=True
    ):
        output = jacobian.ndim - leaf.ndim
        others = tuple(axis for axis in range(output) if axis not in {a % output for a in axes_of_output})
        feeds = np.any(np.asarray(jacobian) != 0, axis=others)  # [*units, *leaf]
        feeds = feeds.reshape(-1, leaf.size).T
        units = axes[jax.tree_util.keystr(path)]
        if units is None:
            assert feeds.sum(axis=1).max() == 1, path  # a number a unit
            assert feeds.sum(axis=0).max() == 1, path
            continue
        kernels += 1
        _, of_unit = np.unique(feeds, axis=0, return_inverse=True)
        index = np.indices(leaf.shape)[list(units)].reshape(len(units), -1).T
        _, of_axes = np.unique(index, axis=0, return_inverse=True)
        pairs = {*zip(of_unit.ravel().tolist(), of_axes.ravel().tolist(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), path
    assert kernels


# The layers, and which axes of their outputs are units.
LINEN = {
    "dense": (nn.Dense(6), X, [-1]),
    "conv": (nn.Conv(6, (3, 3)), X, [-1]),
    "grouped conv": (nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False), X, [-1]),
    "depthwise conv": (nn.Conv(4, (3, 3), feature_group_count=4), X, [-1]),
    "local conv": (nn.ConvLocal(2, (3, 3), padding="VALID"), X, [1, 2, 3]),
    "transposed conv": (nn.ConvTranspose(4, (3, 3)), X, [-1]),
    "transposed conv as in the forward pass": (nn.ConvTranspose(3, (3, 3), transpose_kernel=True), X, [-1]),
    "one input": (nn.Dense(6), X[..., :1], [-1]),
    "heads": (nn.DenseGeneral((2, 3)), X, [-2, -1]),
    "heads, two inputs": (nn.DenseGeneral((2, 3), axis=(-2, -1)), LINE, [-2, -1]),
    "one head": (nn.DenseGeneral((1, 3)), X, [-2, -1]),
    "heads of one feature": (nn.DenseGeneral((3, 1)), X, [-2, -1]),
    "back from heads": (nn.DenseGeneral(6, axis=(-2, -1)), LINE, [-1]),
    "a layer an image row": (nn.DenseGeneral(3, batch_dims=(0,)), LINE[0][:, None], [0, 2]),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    layer, x, axes_of_output = LINEN[name]
    params = layer.init(jax.random.key(0), x)["params"]
    assert_filters_are_what_feeds_a_unit(lambda params: layer.apply({"params": params}, x), params, axes_of_output)


def nnx_layer(make, x, axes_of_output):
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    assert_filters_are_what_feeds_a_unit(lambda p: nnx.merge(graphdef, p, rest)(x), params, axes_of_output)


@pytest.mark.parametrize("use_bias", [True, False])
def test_nnx(use_bias):
    nnx_layer(lambda rngs: nnx.Linear(4, 6, use_bias=use_bias, rngs=rngs), X, [-1])
    nnx_layer(lambda rngs: nnx.Conv(4, 6, (3, 3), use_bias=use_bias, rngs=rngs), X, [-1])
    nnx_layer(lambda rngs: nnx.ConvTranspose(4, 4, (3, 3), use_bias=use_bias, rngs=rngs), X, [-1])
    nnx_layer(lambda rngs: nnx.LinearGeneral((5, 4), 6, axis=(-2, -1), use_bias=use_bias, rngs=rngs), LINE, [-1])
    nnx_layer(lambda rngs: nnx.Einsum("bd,dhf->bhf", (4, 2, 3), (2, 3), rngs=rngs), LINE[0], [-2, -1])


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_of_flax(use_bias):
    """Each projection alone: its units are the features of a head, and those of the output."""
    attention = nnx.MultiHeadAttention(2, 4, qkv_features=6, use_bias=use_bias, decode=False, rngs=nnx.Rngs(0))
    layer = nn.MultiHeadDotProductAttention(2, qkv_features=6, use_bias=use_bias)
    linen = layer.init(jax.random.key(0), LINE)["params"]
    for params in (nnx.to_pure_dict(nnx.state(attention, nnx.Param)), linen):
        axes = landscape.output_axes({"block": params})

        def project(params):
            heads = {
                name: jnp.einsum("bti,ihf->bthf", LINE, params[name]["kernel"]) + params[name].get("bias", 0)
                for name in ("query", "key", "value")
            }
            out = jnp.einsum("bthf,hfo->bto", heads["value"], params["out"]["kernel"]) + params["out"].get("bias", 0)
            return heads, out

        np.testing.assert_allclose(project(linen)[0]["query"].shape, (1, 5, 2, 3))
        for name in ("query", "key", "value"):
            own = {name: params[name]}
            alone = lambda own, name=name, params=params: project({**params, **own})[0][name]
            given = {f"['{name}']['kernel']": axes[f"['block']['{name}']['kernel']"]}
            assert_filters_are_what_feeds_a_unit(alone, own, [-2, -1], given)
        assert axes["['block']['out']['kernel']"] == (2,)
        outward = lambda own, params=params: project({**params, **own})[1]
        assert_filters_are_what_feeds_a_unit(outward, {"out": params["out"]}, [-1])
    # The projections above are those of the layer.
    heads = attention.query(LINE)
    np.testing.assert_allclose(
        project(nnx.to_pure_dict(nnx.state(attention, nnx.Param)))[0]["query"], heads, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("vectors", ["zero", "scale"])
def test_directions_of_attention(x64, vectors):
    """What was wrong once: kernels cut by features alone, biases of heads taken for kernels."""
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    params = jax.tree.map(lambda x: x.astype(float), nnx.state(attention, nnx.Param))
    first, second = landscape.filter_normalized_directions(params, jax.random.key(1), vectors=vectors)
    for name, inputs in {"query": 0, "key": 0, "value": 0, "out": (0, 1)}.items():
        weights, a, b = (tree[name]["kernel"].get_value() for tree in (params, first, second))
        for direction in (a, b):
            lengths = np.sum(direction**2, axis=inputs)
            np.testing.assert_allclose(lengths, np.sum(weights**2, axis=inputs), rtol=1e-12)
        np.testing.assert_allclose(np.sum(a * b, axis=inputs), 0, atol=1e-12)
        biases, moved = (tree[name]["bias"].get_value() for tree in (params, first))
        expected = np.linalg.norm(biases) if vectors == "scale" else 0
        np.testing.assert_allclose(np.linalg.norm(moved), expected, rtol=1e-12)


@pytest.mark.parametrize("stacked_kernel", [(3, 5, 4), (3, 5, 2, 4)])
def test_layers_stacked_by_scan(stacked_kernel):
    params = {"kernel": jnp.ones(stacked_kernel), "bias": jnp.ones((3, *stacked_kernel[2:]))}
    together = lambda p: jnp.einsum("i,li...->l...", jnp.arange(1.0, 6.0), p["kernel"]) + p["bias"]
    assert_filters_are_what_feeds_a_unit(together, params, range(len(stacked_kernel) - 1))


def test_haiku():
    hk = pytest.importorskip("haiku")
    layers = {
        "linear": (lambda: hk.Linear(6), X, [-1]),
        "conv": (lambda: hk.Conv2D(4, 3), X, [-1]),
        "conv, channels first": (lambda: hk.Conv2D(3, 3, data_format="NCHW"), X, [1]),
        "depthwise": (lambda: hk.DepthwiseConv2D(1, 3), X, [-1]),
        "transposed": (lambda: hk.Conv2DTranspose(4, 3), X, [-1]),  # as many outputs as inputs
        "transposed, renamed": (lambda: hk.Conv2DTranspose(6, 3, name="up"), X, [-1]),
        "embedding": (lambda: lambda x: hk.Embed(5, 4)(jnp.arange(5)), X, [-1]),
    }
    for make, x, axes_of_output in layers.values():
        model = hk.without_apply_rng(hk.transform(lambda x, make=make: make()(x)))
        params = model.init(jax.random.key(0), x)
        assert_filters_are_what_feeds_a_unit(
            lambda params, model=model, x=x: model.apply(params, x), params, axes_of_output
        )


def test_haikus_attention_and_vectors_of_four_axes():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.LayerNorm(-1, True, True)(x)[:, 0]
        x = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.RandomNormal())(x, x, x)
        return hk.Bias(bias_dims=[1, 2])(x)

    params, _ = hk.transform_with_state(forward).init(jax.random.key(0), X)
    axes = landscape.output_axes(params)
    assert params["batch_norm"]["scale"].shape == (1, 1, 1, 4)
    assert params["bias"]["b"].shape == (5, 6)
    for path, units in axes.items():
        assert units == ((1,) if path.endswith("['w']") else None), path
    assert sum(units == (1,) for units in axes.values()) == 4


def test_equinox():
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    first = jnp.moveaxis(X[0], -1, 0)  # channels first
    layers = [
        (eqx.nn.Linear(4, 6, key=key), X[0, 0, 0], [-1]),
        (eqx.nn.Linear(4, 4, use_bias=False, key=key), X[0, 0, 0], [-1]),
        (eqx.nn.Conv2d(4, 6, 3, groups=2, key=key), first, [0]),
        (eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=key), first, [0]),
    ]
    for layer, x, axes_of_output in layers:
        params, static = eqx.partition(layer, eqx.is_inexact_array)
        apply = lambda params, static=static, x=x: eqx.combine(params, static)(x)
        assert_filters_are_what_feeds_a_unit(apply, params, axes_of_output)
    no_filters = [eqx.nn.LayerNorm((4, 5)), eqx.nn.GroupNorm(2, 4), eqx.nn.PReLU(0.1)]
    for layer in no_filters:
        assert set(landscape.output_axes(eqx.filter(layer, eqx.is_inexact_array)).values()) == {None}
    attention = eqx.filter(eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, key=key), eqx.is_inexact_array)
    axes = landscape.output_axes(attention)
    assert axes.pop(".query_proj.bias") is None
    assert set(axes.values()) == {(0,)}
    assert landscape.output_axes(eqx.filter(eqx.nn.GRUCell(3, 4, key=key), eqx.is_inexact_array)) == {
        ".weight_ih": (0,), ".weight_hh": (0,), ".bias": None, ".bias_n": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_network_of_the_experiments(name):
    """By the type of each layer, at full size: every parameter of it, and no other but the ViT's tokens."""
    image = (224, 224, 3) if name in ("vit_s32", "vit_b32") else (32, 32, 3)
    model = nnx.eval_shape(lambda: build(name, 10, image, nnx.Rngs(0)))
    axes = landscape.output_axes(nnx.state(model, nnx.Param))
    shapes = {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    }
    expected = {}
    for path, layer in nnx.iter_modules(model):
        at = "".join(f"[{key!r}]" for key in path)
        match layer:
            case nnx.Linear() | nnx.Conv():
                expected[f"{at}['kernel'].value"] = (layer.out_features,)
            case nnx.LinearGeneral():
                expected[f"{at}['kernel'].value"] = layer.out_features
            case nnx.BatchNorm() | nnx.LayerNorm():
                expected[f"{at}['scale'].value"] = None
            case DepthwiseConv() | PointwiseConv():  # without a bias
                expected[f"{at}['kernel'].value"] = (layer.kernel.shape[-1],)
                continue
            case _:
                continue
        if layer.bias is not None:
            expected[f"{at}['bias'].value"] = None
    if name.startswith("vit"):
        expected |= {"['class_token'].value": None, "['positions'].value": (model.class_token.shape[-1],)}
    assert expected == {path: units and tuple(shapes[path][axis] for axis in units) for path, units in axes.items()}


@pytest.mark.parametrize("name", ["resnet18", "vit_ti4"])
def test_directions_of_the_networks(name):
    model = nnx.jit(lambda: build(name, 5, (16, 16, 3), nnx.Rngs(0), **REDUCED[name]))()
    params = nnx.state(model, nnx.Param)
    axes = landscape.output_axes(params)
    (direction,) = landscape.filter_normalized_directions(params, jax.random.key(0), 1)
    found = jax.tree_util.tree_leaves_with_path(direction)
    for (path, moved), weights in zip(found, jax.tree.leaves(params), strict=True):
        units = axes[jax.tree_util.keystr(path)]
        if units is None:
            np.testing.assert_array_equal(moved, 0)
            continue
        inputs = tuple(axis for axis in range(weights.ndim) if axis not in units)
        squares = [np.sum(np.square(x, dtype=np.float64), axis=inputs) for x in (moved, weights)]
        np.testing.assert_allclose(*squares, rtol=1e-5)


def test_the_caller_may_know_better(x64):
    params = {"table": jnp.asarray(np.random.default_rng(0).normal(size=(5, 3))), "kernel": jnp.ones((2, 3, 4))}
    given = {"['table']": (0,), "['kernel']": ()}
    (rows,) = landscape.filter_normalized_directions(params, jax.random.key(0), 1, output_axes=given)
    np.testing.assert_allclose(np.linalg.norm(rows["table"], axis=1), np.linalg.norm(params["table"], axis=1))
    np.testing.assert_allclose(np.linalg.norm(rows["kernel"]), 24**0.5)  # one filter
    assert np.ptp(np.linalg.norm(rows["kernel"], axis=(0, 1))) > 0.01
    everything = landscape.output_axes(params) | {"['table']": None, "['kernel']": (-2, -1)}
    (kept,) = landscape.filter_normalized_directions(params, jax.random.key(0), 1, output_axes=everything)
    np.testing.assert_array_equal(kept["table"], 0)
    np.testing.assert_allclose(np.linalg.norm(kept["kernel"], axis=0), 2**0.5)


def test_what_is_not_clear_is_refused():
    params = {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(7)}}
    with pytest.raises(ValueError, match=r"\['layer'\]\['kernel'\] are not clear.*\(3, 4\).*\(7,\)"):
        landscape.output_axes(params)
    given = {"['layer']['kernel']": (1,)}
    landscape.filter_normalized_directions(params, jax.random.key(0), output_axes=given)
    with pytest.raises(ValueError, match=r"no leaf of params; there is \"\['layer'\]\['kernel'\]\""):
        landscape.filter_normalized_directions(params, jax.random.key(0), output_axes={"['layer']['kernels']": None})
    with pytest.raises(ValueError, match=r"None or axes of an array of shape \(3, 4\)"):
        landscape.filter_normalized_directions(params, jax.random.key(0), output_axes={"['layer']['kernel']": (2,)})


def test_a_matrix_called_b_is_a_kernel_unless_it_is_haikus():
    shapes = {
        "low_rank": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))},
        "conv": {"w": jnp.ones((3, 4)), "b": jnp.ones((4, 1))},
    }
    axes = landscape.output_axes(shapes)
    assert axes["['low_rank']['b']"] == (1,)
    assert axes["['conv']['b']"] is None
