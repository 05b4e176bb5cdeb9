"""The networks: parameter counts of the literature, shapes, precision, and what normalization does when."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from flax import nnx

from experiments.networks.layers import Layers
from experiments.networks.network import build, parameter_count
from experiments.networks.residual import BasicBlock, Bottleneck, PyramidBlock

CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)

# One small network of each architecture.
REDUCED = {
    "resnet18": {"width": 8, "stage_sizes": (1, 1)},
    "resnet50": {"width": 8, "stage_sizes": (1, 1)},
    "wrn28_10": {"depth": 10, "widen_factor": 1},
    "pyramidnet110": {"depth": 8, "alpha": 12},
    "vit_ti4": {"width": 24, "depth": 2},
}


def reduced(name, image_shape=(16, 16, 3), **changes):
    return build(name, 5, image_shape, nnx.Rngs(0), **(REDUCED[name] | changes))


def layers():
    return Layers(jnp.float32, nnx.Rngs(0))


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The figures are exact counts of well-known implementations where one publishes them:
# ResNets on CIFAR: model tables of the pytorch-cifar family (11,173,962; 23,520,842; 42,512,970 for ten classes).
# ResNets and ViT-B/32 on ImageNet: num_params in the weight cards of torchvision.
# WRN-28-10 (36.5M in the paper's table) and PyramidNet-110 α=270 (28.5M): the counts that pytorchcv asserts.
@pytest.mark.parametrize(
    ("name", "num_classes", "image_shape", "count"),
    [
        ("resnet18", 10, CIFAR, 11_173_962),
        ("resnet50", 10, CIFAR, 23_520_842),
        ("resnet101", 10, CIFAR, 42_512_970),
        ("resnet18", 1000, IMAGENET, 11_689_512),
        ("resnet50", 1000, IMAGENET, 25_557_032),
        ("resnet101", 1000, IMAGENET, 44_549_160),
        ("wrn28_10", 10, CIFAR, 36_479_194),
        ("wrn28_10", 100, CIFAR, 36_536_884),
        ("pyramidnet110", 10, CIFAR, 28_485_477),
        ("pyramidnet110", 100, CIFAR, 28_511_307),
        ("vit_b32", 1000, IMAGENET, 88_224_232),
    ],
)
def test_parameter_count_is_the_published_one(name, num_classes, image_shape, count):
    model = nnx.eval_shape(lambda: build(name, num_classes, image_shape, nnx.Rngs(0)))
    assert parameter_count(model) == count


@pytest.mark.parametrize(
    ("name", "num_classes", "image_shape", "patch", "d"),
    [("vit_s32", 1000, IMAGENET, 32, 384), ("vit_b32", 1000, IMAGENET, 32, 768), ("vit_ti4", 10, CIFAR, 4, 192)],
)
def test_vit_parameter_count_follows_from_the_architecture(name, num_classes, image_shape, patch, d):
    # Derived by hand. The formula gives torchvision's figure for ViT-B/32; S/32 (22.9M in the literature) and Ti/4
    # differ in d, and Ti/4 in patch and image size.
    tokens = 1 + (image_shape[0] // patch) ** 2
    embedding = (3 * patch**2 + 1) * d + d + tokens * d  # patches with bias, class token, positions
    attention = 4 * (d * d + d)  # query, key, value, output, with biases
    perceptron = (d * 4 * d + 4 * d) + (4 * d * d + d)
    block = 2 * d + attention + 2 * d + perceptron  # a LayerNorm has a scale and a bias
    expected = embedding + 12 * block + 2 * d + (d * num_classes + num_classes)
    model = nnx.eval_shape(lambda: build(name, num_classes, image_shape, nnx.Rngs(0)))
    assert parameter_count(model) == expected


@pytest.mark.parametrize("name", REDUCED)
def test_forward_in_both_modes(name):
    model = nnx.jit(lambda: reduced(name))()  # quicker than one operation at a time
    # A ViT's head starts at zero: give it something to say.
    model.head.kernel[...] = images(*model.head.kernel.shape)
    x = images(4, 16, 16, 3)

    @nnx.jit
    def forward(model, x):
        return model(x)

    others = x.at[2:].multiply(3)
    model.eval()
    logits, same_examples = forward(model, x), forward(model, others)
    assert logits.shape == (4, 5)
    assert jnp.isfinite(logits).all()
    # In eval mode an example's logits do not depend on its batch; in train mode BatchNorm makes them.
    np.testing.assert_allclose(same_examples[:2], logits[:2], rtol=1e-5, atol=1e-5)
    assert not np.allclose(same_examples[2:], logits[2:], rtol=1e-3)
    model.train()
    logits, same_examples = forward(model, x), forward(model, others)
    has_batch_norm = name != "vit_ti4"
    assert np.allclose(same_examples[:2], logits[:2], rtol=1e-3, atol=1e-5) != has_batch_norm


def test_batch_norm_keeps_a_tenth_of_the_new_statistics():
    norm = layers().batch_norm(3)
    x = 2 + 3 * images(8, 4, 4, 3)
    mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    norm.train()
    np.testing.assert_allclose(norm(x), (x - mean) / jnp.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * variance, rtol=1e-4)
    mean, variance = jnp.copy(norm.mean[...]), jnp.copy(norm.var[...])
    norm.eval()
    np.testing.assert_allclose(norm(x), (x - mean) / jnp.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(norm.mean[...], mean)
    np.testing.assert_array_equal(norm.var[...], variance)


def test_batch_norm_traces_without_an_error_message():
    # jax before 0.12 walks the whole program traced so far to write one, once for every statistic of nnx's own layer.
    model = reduced("resnet18")
    written = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name == "_origin_msg":
            written.append(frame)

    sys.setprofile(watch)
    try:
        nnx.jit(lambda model, x: model(x).sum()).lower(model, images(2, 16, 16, 3))
    finally:
        sys.setprofile(None)
    assert not written


@pytest.mark.parametrize("name", REDUCED)
def test_bfloat16_computes_with_float32_parameters_and_logits(name, monkeypatch):
    model = nnx.eval_shape(lambda: reduced(name, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    block, seen = type(model.blocks[0]), []
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, x: seen.append(x.dtype) or call(self, x))
    logits = nnx.eval_shape(lambda model: model(jnp.zeros((2, 16, 16, 3))), model)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_zero_init_makes_each_block_its_shortcut(kind):
    block = kind(layers(), inputs=4, outputs=8, stride=2, zero_init_residual=True)
    x = images(2, 8, 8, 4)
    np.testing.assert_allclose(block(x), nnx.relu(block.shortcut(x)), atol=1e-6)
    plain = kind(layers(), inputs=4, outputs=8, stride=2, zero_init_residual=False)
    assert not np.allclose(plain(x), nnx.relu(plain.shortcut(x)), atol=1e-2)


def test_the_stem_follows_the_image_size():
    small = nnx.eval_shape(lambda: build("resnet18", 10, (64, 64, 3), nnx.Rngs(0)))
    large = nnx.eval_shape(lambda: build("resnet18", 10, (65, 65, 3), nnx.Rngs(0)))
    assert small.conv.kernel.shape[:2] == (3, 3)
    assert large.conv.kernel.shape[:2] == (7, 7)


def test_the_strided_stem_halves_the_image_without_pooling():
    network = nnx.eval_shape(lambda: build("resnet8", 10, (32, 32, 3), nnx.Rngs(0), stem="strided"))
    assert network.conv.kernel.shape == (3, 3, 3, 16)
    features = nnx.eval_shape(
        lambda: build("resnet8", 10, (32, 32, 3), nnx.Rngs(0), stem="strided").conv(images(1, 32, 32, 3))
    )
    assert features.shape == (1, 16, 16, 16)
    assert not network.is_imagenet


def test_pyramid_shortcut_averages_and_pads_with_zeros():
    block = PyramidBlock(layers(), inputs=3, outputs=5, stride=2)
    block.norm3.scale[...] = jnp.zeros(5)  # leaves the shortcut alone
    x = images(2, 8, 8, 3)
    y = block(x)
    assert y.shape == (2, 4, 4, 5)
    np.testing.assert_allclose(y[..., :3], x.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[..., 3:], 0)
    odd = block(images(2, 7, 7, 3))  # the last row and column are averages of what is there
    np.testing.assert_allclose(odd[:, 3, 3, :3], images(2, 7, 7, 3)[:, 6, 6], rtol=1e-5)


def test_he_initialization_keeps_the_variance_of_the_gradient():
    kernel = layers().conv(64, 96, 3).kernel[...]
    assert float(jnp.var(kernel)) == pytest.approx(2 / (9 * 96), rel=0.02)


@pytest.mark.parametrize("name", REDUCED)
def test_one_channel_images_of_28_pixels(name):
    logits = nnx.eval_shape(lambda: reduced(name, (28, 28, 1))(jnp.zeros((2, 28, 28, 1))))
    assert logits.shape == (2, 5)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        build("resnet-18", 10, CIFAR, nnx.Rngs(0))
    with pytest.raises(ValueError, match="there are resnet8, resnet18, "):
        build("transformer", 10, CIFAR, nnx.Rngs(0))
    with pytest.raises(ValueError, match="32×32 pixels do not tile an image of 28×28"):
        build("vit_s32", 10, (28, 28, 1), nnx.Rngs(0))
    with pytest.raises(ValueError, match="6n \\+ 4"):
        build("wrn28_10", 10, CIFAR, nnx.Rngs(0), depth=27)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        build("pyramidnet110", 10, CIFAR, nnx.Rngs(0), depth=109)
    with pytest.raises(ValueError, match="stem must be"):
        build("resnet18", 10, CIFAR, nnx.Rngs(0), stem="mnist")
