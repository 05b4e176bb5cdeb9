"""The settings of each experiment, as typed dataclasses whose fields are the command line's options."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sgd:
    """SGD's settings, chosen by `python -m experiments tune digits`."""

    learning_rate: float = 0.01
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
    meta_fields=["penalty", "offset", "max_penalty_ratio", "evaluation"],
)
@dataclasses.dataclass(frozen=True)
class CrSam:
    """CR-SAM's settings, chosen by `python -m experiments tune digits`."""

    learning_rate: float = 0.1
    rho: float = 0.4
    alpha: float = 0.5
    beta: float = 0.1
    penalty: Literal["log", "linear"] = "log"
    offset: float = 1.0
    max_penalty_ratio: float | None = None
    evaluation: Literal["auto", "vmap", "sequential", "ordered"] = "auto"


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

    model: str = "convnet"
    """convnet, or a network of experiments.models for images of 32×32 pixels, such as resnet18 or vit_ti4."""
    width: int = 32
    """Channels of the ConvNet's first convolution."""
    batch_size: int = 64
    rounds: int = 20
    conditional: bool = False
    """Also time CR-SAM inside a conditional, as the policies choose inside a jitted step: slow on CPU."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How a training run is carried out; none of it changes the result, but for rounding."""

    out: Path | None = None
    """Folder of the run; results/RECIPE/METHOD-AUGMENTATION-seedSEED by default."""
    data_dir: Path | None = None
    """Folder of the data sets that TFDS prepared."""
    workers: int = 8
    """Processes that decode ImageNet; 0 decodes in the training process. Their number does not change the batches."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep every k-th epoch's checkpoint too, for measurements over training."""
    checkpoint_steps: int | None = None
    """Save after so many steps too, not only after each epoch."""
    log_steps: int = 20
    """Write the loss and the diagnostics every so many steps."""
    devices: int | None = None
    """Use the first so many devices; all by default."""
    distributed: bool = False
    """One of several processes. On TPU pods and under Slurm the rest is found out."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class Readiness:
    """What full-size runs take. Run it with `python -m experiments readiness`."""

    teraflops: float = 100.0
    """Sustained throughput of the device or of all devices together, 10¹² FLOP/s; a third of the peak is usual."""
    compile: bool = False
    """Compile each step for this machine's backend, for its memory; minutes each on a CPU."""
    out: Path | None = None
    """Write the table to this file too."""
