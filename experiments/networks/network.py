"""Networks by name, with loss and logits: those of the paper, two small ones, and those that a user's file makes."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from experiments.data.inputs import Signature
from experiments.networks.convnet import ConvNet
from experiments.networks.efficientnet import EfficientNet
from experiments.networks.layers import Layers, Shape
from experiments.networks.pretrained import Weights, placed
from experiments.networks.residual import BasicBlock, Bottleneck, PyramidNet, ResNet, WideResNet
from experiments.networks.vit import VisionTransformer
from experiments.settings import python_files
from experiments.settings.recipes import NetworkSettings
from experiments.settings.sources import in_python_file
from experiments.settings.suggestions import unknown

LossFn = Callable[..., tuple[jax.Array, Any]]
"""``(params, model_state, images, labels, label_smoothing=None) -> loss, (new model state, right answers)``."""


class Network(NamedTuple):
    """Functions of params and model state: BatchNorm's statistics.

    Attributes:
      init: from a seed, and pretrained weights for all but the head or None, to params and model state.
      loss_fn: in training mode.
      logits: in evaluation mode, with stored statistics, ``(params, model_state, images) -> logits``.
      remeasured: the model state with BatchNorm's statistics of these images alone, ``(params, model_state, images)``.
    """

    init: Callable[[int | jax.Array, Weights | None], tuple[Any, Any]]
    loss_fn: LossFn
    logits: Callable[[Any, Any, jax.Array], jax.Array]
    remeasured: Callable[[Any, Any, jax.Array], Any]


def make_network(settings: NetworkSettings, signature: Signature, groups: int = 1) -> Network:
    """Builds a network.

    A batch passes it in ``groups`` parts together, each with BatchNorm statistics of its own, as many as devices; and
    in ``settings.accumulate`` parts one after the other. Its loss is one function of the whole batch all the same, and
    so its perturbation is.
    """
    shape, options = signature.image_shape, dict[str, Any](settings.options)

    def make_model(seed: int | jax.Array) -> nnx.Module:
        rngs = nnx.Rngs(jax.random.key(seed))
        return build(settings.model, signature.num_classes, shape, rngs, settings.dtype, **options)

    abstract = nnx.eval_shape(lambda: make_model(0))
    graphdef = nnx.graphdef(abstract)
    if in_python_file(settings.model):
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        logits_of = lambda model, images: python_files.told(settings.model, partial(model, images))
        check_logits(settings.model, nnx.eval_shape(logits_of, abstract, images), 2, signature.num_classes)

    def init(seed: int | jax.Array, weights: Weights | None) -> tuple[Any, Any]:
        model = make_model(seed)
        params, model_state = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
        return (params, model_state) if weights is None else placed(weights, params, model_state)

    def loss_of_batch(
        params: Any, model_state: Any, images: jax.Array, labels: jax.Array, label_smoothing: ArrayLike | None = None
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.train()
        logits = model(images)
        if label_smoothing is None:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        else:
            shares = jax.nn.one_hot(labels, signature.num_classes)
            losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(shares, label_smoothing))
        loss = jnp.mean(losses)
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), jnp.sum(jnp.argmax(logits, -1) == labels))

    def logits(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.eval()
        return model(images)

    def remeasured(params: Any, model_state: Any, images: jax.Array) -> Any:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        model.train()
        model.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
        model(images)
        return nnx.state(model, nnx.Not(nnx.Param))

    loss_fn: LossFn = loss_of_batch
    if groups > 1:
        loss_fn = _mean_over(loss_fn, lambda x: x.reshape(groups, -1, *x.shape[1:]), jax.vmap)
    if settings.accumulate > 1:
        # Each part is spread over the batch, so that each device keeps what it has; for the memory of one part,
        # activations are computed again in the backward pass.
        split = lambda x: x.reshape(-1, settings.accumulate, *x.shape[1:]).swapaxes(0, 1)
        loss_fn = _mean_over(loss_fn, split, lambda loss: partial(jax.lax.map, jax.checkpoint(loss)))
    return Network(init, loss_fn, logits, remeasured)


def _mean_over(loss_fn: LossFn, split: Callable[[jax.Array], jax.Array], mapped: Callable[..., Any]) -> LossFn:
    """The mean over parts of a batch."""

    def mean_loss(
        params: Any, model_state: Any, images: jax.Array, labels: jax.Array, label_smoothing: ArrayLike | None = None
    ) -> tuple[jax.Array, Any]:
        of_parts = mapped(lambda part: loss_fn(params, model_state, *part, label_smoothing))
        losses, (states, correct) = of_parts((split(images), split(labels)))
        return jnp.mean(losses), (jax.tree.map(lambda x: jnp.mean(x, axis=0), states), jnp.sum(correct))

    return mean_loss


_NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "resnet8": (ResNet, {"stage_sizes": (1, 1, 1), "block": BasicBlock, "width": 16}),  # He et al.'s least of 3 stages
    "resnet18": (ResNet, {"stage_sizes": (2, 2, 2, 2), "block": BasicBlock}),
    "resnet50": (ResNet, {"stage_sizes": (3, 4, 6, 3), "block": Bottleneck}),
    "resnet101": (ResNet, {"stage_sizes": (3, 4, 23, 3), "block": Bottleneck}),
    "wrn28_10": (WideResNet, {"depth": 28, "widen_factor": 10}),
    "pyramidnet110": (PyramidNet, {"depth": 110, "alpha": 270}),
    "vit_s32": (VisionTransformer, {"patch_size": 32, "width": 384, "num_heads": 6}),
    "vit_b32": (VisionTransformer, {"patch_size": 32, "width": 768, "num_heads": 12}),
    "vit_ti4": (VisionTransformer, {"patch_size": 4, "width": 192, "num_heads": 3}),
    "efficientnet_lite0": (EfficientNet, {"stage_sizes": (1, 2, 2, 3, 3, 4, 1)}),
    "convnet": (ConvNet, {}),
}
NAMES = tuple(_NETWORKS)

_GIVEN = {"self", "make", "num_classes", "channels", "image_shape", "rngs", "block"}  # by the data and the recipe

_SMALL_IMAGE = 64  # pixels; residual networks take the stem of ImageNet above


def build(
    name: str, num_classes: int, image_shape: Shape, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, **changes: Any
) -> nnx.Module:
    """Builds a network, from images [batch, height, width, channels] to logits [batch, num_classes].

    ResNets take the stem of ImageNet for images above 64 pixels, and then start each block as its shortcut
    (Goyal et al. 2017); below, the stem of CIFAR and the plain initialization.

    Args:
      name: one of ``NAMES``, or ``FILE.py:FUNCTION``.
      num_classes: how many logits.
      image_shape: height, width and channels of the images.
      rngs: where initial values come from.
      dtype: in which the network computes; parameters and logits are float32.
      **changes: arguments of the architecture to change, such as ``width=16`` for a reduced one.

    Raises:
      ValueError: if there is no such network, or it has no such option.

    Example:
      >>> model = nnx.eval_shape(lambda: build("resnet18", 10, (32, 32, 3), nnx.Rngs(0)))  # allocates nothing
      >>> parameter_count(model)
      11173962
    """
    if in_python_file(name):
        return _from_file(name, num_classes, image_shape, rngs, jnp.dtype(dtype), changes)
    if name not in _NETWORKS:
        raise unknown("model", name, NAMES)
    architecture, defaults = _NETWORKS[name]
    known = [option for option in inspect.signature(architecture.__init__).parameters if option not in _GIVEN]
    for option in changes:
        if option not in known:
            raise unknown(f"option of {name} (see model_options)", option, known)
    if architecture is ConvNet:
        if (dtype := jnp.dtype(dtype)) != jnp.float32:
            raise ValueError(f"The ConvNet computes in float32 alone: take another network for --dtype {dtype}.")
        return ConvNet(image_shape[-1], num_classes, **changes, rngs=rngs)
    if architecture is ResNet:
        is_large = max(image_shape[:2]) > _SMALL_IMAGE
        defaults = defaults | {"stem": "imagenet" if is_large else "cifar", "zero_init_residual": is_large}
    return architecture(Layers(dtype, rngs), num_classes, image_shape, **(defaults | changes))


def _from_file(
    name: str, num_classes: int, image_shape: Shape, rngs: nnx.Rngs, dtype: jnp.dtype, changes: dict[str, Any]
) -> nnx.Module:
    """The network that a function or class in a user's file makes; it gets the arguments that it takes."""
    given = {"num_classes": num_classes, "image_shape": image_shape, "rngs": rngs, "dtype": dtype}
    known = python_files.parameters(name)
    options = [option for option in known if option not in given]
    for option in changes:
        if option not in options:
            raise unknown(f"option of {name} (see model_options)", option, options or ["none"])
    for option in options:
        if known[option].default is inspect.Parameter.empty and option not in changes:
            raise ValueError(
                f"{name} has the argument {option}, which nothing gives: a network gets {', '.join(given)}. Give "
                f"{option} a default, or --set model_options.{option}=VALUE."
            )
    if "dtype" not in known and dtype != jnp.float32:
        raise ValueError(f"{name} has no argument dtype, so it computes in float32 alone, not in --dtype {dtype}.")
    model = python_files.call(name, **{key: given[key] for key in given if key in known}, **changes)
    if not isinstance(model, nnx.Module):
        raise ValueError(f"{name} must return a flax.nnx.Module, got {type(model).__name__}.")
    return model


def check_logits(name: str, logits: Any, examples: int, num_classes: int) -> None:
    """Checks the shape of what a network returns.

    Raises:
      ValueError: with the shape that was found.
    """
    found = getattr(logits, "shape", type(logits).__name__)
    if found != (examples, num_classes):
        raise ValueError(
            f"{name} must return logits of the shape [examples, {num_classes}] for {num_classes} classes, "
            f"got {list(found) if isinstance(found, tuple) else found} for {examples} examples."
        )


def parameter_count(model: nnx.Module) -> int:
    """How many numbers are trained; works on the abstract model of ``nnx.eval_shape`` too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
