"""The settings of each experiment, as typed dataclasses whose fields are the command line's options."""

import dataclasses
import functools
from typing import Literal

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sgd:
    """SGD's settings, chosen by `python -m experiments tune digits`."""

    learning_rate: float = 0.03
    """Peak of the cosine schedule."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sam:
    """SAM's settings, chosen by `python -m experiments tune digits`."""

    learning_rate: float = 0.03
    rho: float = 0.2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["learning_rate", "rho", "alpha", "beta"],
    meta_fields=["penalty", "offset", "max_penalty_ratio"],
)
@dataclasses.dataclass(frozen=True)
class CrSam:
    """CR-SAM's settings, chosen by `python -m experiments tune digits`."""

    learning_rate: float = 0.03
    rho: float = 0.2
    alpha: float = 0.1
    beta: float = 0.01
    penalty: Literal["log", "linear"] = "log"
    offset: float = 1.0
    max_penalty_ratio: float | None = None


Settings = Sgd | Sam | CrSam


@dataclasses.dataclass(frozen=True)
class Digits:
    """Compare methods on scikit-learn's handwritten digits: few images, wrong labels, no augmentation.

    Run it with `python -m experiments compare digits`.
    """

    methods: tuple[str, ...] = ("sgd", "sgd-3x", "sam", "crsam")
    """Methods to compare, or all. sgd-3x is SGD for three times the epochs, CR-SAM's number of gradient evaluations."""
    seeds: int = 5
    """Runs of each method. The seed sets the wrong labels, the initial weights and the order of the batches."""
    train_examples: int = 500
    label_noise: float = 0.4
    """Fraction of training labels that are replaced by a wrong one. Test labels stay right."""
    width: int = 16
    """Channels of the network's first convolution."""
    epochs: int = 40
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sgd: Sgd = dataclasses.field(default_factory=Sgd)
    sam: Sam = dataclasses.field(default_factory=Sam)
    crsam: CrSam = dataclasses.field(default_factory=CrSam)
    probe_rho: float = 0.05
    """Distance at which curvature is measured after an epoch, the same for all methods."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time and memory of one step. Run it with `python -m experiments benchmark`."""

    model: Literal["convnet"] = "convnet"
    width: int = 32
    batch_size: int = 64
    rounds: int = 20
