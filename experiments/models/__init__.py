"""The networks of the paper, and a small one, by name."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.pyramidnet import PyramidNet
from experiments.models.resnet import BasicBlock, Bottleneck, ResNet
from experiments.models.vit import VisionTransformer
from experiments.models.wide_resnet import WideResNet
from experiments.names import unknown

NAMES = ("resnet8", "resnet18", "resnet50", "resnet101", "wrn28_10", "pyramidnet110", "vit_s32", "vit_b32", "vit_ti4")

_GIVEN = (
    "self",
    "num_classes",
    "channels",
    "in_channels",
    "image_shape",
    "dtype",
    "rngs",
)  # by the data and the recipe

_SMALL_IMAGE = 64  # pixels; residual networks take the stem of ImageNet above


def build(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    **changes: Any,
) -> nnx.Module:
    """Builds a network of the paper, or ResNet-8.

    Residual networks take the stem of ImageNet for images above 64 pixels, and then start each block as its shortcut
    (Goyal et al. 2017); below, the stem of CIFAR and the plain initialization.

    Args:
      name: one of ``NAMES``.
      num_classes: how many logits.
      image_shape: height, width and channels of the images.
      rngs: where initial values come from.
      dtype: in which the network computes; parameters and logits are float32.
      **changes: arguments of the architecture to change, such as ``width=16`` for a reduced one.

    Returns:
      The network: a module from images [batch, height, width, channels] to logits [batch, num_classes].

    Raises:
      ValueError: if there is no such network, or it has no such option.

    Example:
      >>> model = nnx.eval_shape(lambda: build("resnet18", 10, (32, 32, 3), nnx.Rngs(0)))  # allocates nothing
      >>> parameter_count(model)
      11173962
    """
    channels = image_shape[-1]
    is_large = max(image_shape[:2]) > _SMALL_IMAGE
    residual = {
        "num_classes": num_classes,
        "in_channels": channels,
        "stem": "imagenet" if is_large else "cifar",
        "zero_init_residual": is_large,
    }
    plain = {"num_classes": num_classes, "in_channels": channels}
    tokens = {"num_classes": num_classes, "image_shape": image_shape, "depth": 12}
    architecture: type[nnx.Module]
    defaults: dict[str, Any]
    match name:
        case "resnet8":  # the least of He et al.'s three-stage networks
            architecture = ResNet
            defaults = residual | {"stage_sizes": (1, 1, 1), "block": BasicBlock, "width": 16}
        case "resnet18":
            architecture, defaults = ResNet, residual | {"stage_sizes": (2, 2, 2, 2), "block": BasicBlock}
        case "resnet50":
            architecture, defaults = ResNet, residual | {"stage_sizes": (3, 4, 6, 3), "block": Bottleneck}
        case "resnet101":
            architecture, defaults = ResNet, residual | {"stage_sizes": (3, 4, 23, 3), "block": Bottleneck}
        case "wrn28_10":
            architecture, defaults = WideResNet, plain | {"depth": 28, "widen_factor": 10}
        case "pyramidnet110":
            architecture, defaults = PyramidNet, plain | {"depth": 110, "alpha": 270}
        case "vit_s32":
            architecture, defaults = VisionTransformer, tokens | {"patch_size": 32, "width": 384, "num_heads": 6}
        case "vit_b32":
            architecture, defaults = VisionTransformer, tokens | {"patch_size": 32, "width": 768, "num_heads": 12}
        case "vit_ti4":
            architecture, defaults = VisionTransformer, tokens | {"patch_size": 4, "width": 192, "num_heads": 3}
        case _:
            raise unknown("model", name, NAMES)
    check_options(name, architecture, changes)
    return architecture(**(defaults | changes), dtype=dtype, rngs=rngs)


def check_options(name: str, architecture: type[nnx.Module], options: Iterable[str]) -> None:
    """Makes sure that a network takes some options.

    Raises:
      ValueError: naming the first that it does not take, and those that it does.
    """
    known = [option for option in inspect.signature(architecture.__init__).parameters if option not in _GIVEN]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}, it has {', '.join(known)}: see model_options.")


def parameter_count(model: nnx.Module) -> int:
    """How many numbers are trained; works on the abstract model of ``nnx.eval_shape`` too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
