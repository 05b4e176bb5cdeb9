"""The settings of each command, as typed dataclasses whose fields are the command line's options."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from experiments.settings.ranges import Count, CountOrNone, NotNegative, Positive, Several, option

What = Literal["all", "figure1", "figure2", "figure4", "figure5", "table3", "html"]

_without_prefix = tyro.conf.configure(tyro.conf.arg(name=""))  # --seeds, not --config.seeds


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Overrides:
    """Changes to a recipe, beside its options, which count more."""

    config: Path | None = None
    """JSON file with settings of the recipe, nested or by dotted names; a run's config.json gives that run back."""
    set: tuple[str, ...] = ()
    """Settings as key=value, such as crsam.rho=0.2; they count more than the file."""


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Run:
    """How a training run is carried out; none of it changes the result, but for rounding."""

    out: Path | None = None
    """Folder of the results; one under results/ by default."""
    data_dir: Path | None = None
    """Folder of the data sets that TFDS prepared."""
    workers: CountOrNone = 8
    """Processes that decode ImageNet; 0 decodes in the training process. Their number does not change the batches."""
    keep: Count | None = 3
    """Newest checkpoints to keep; None writes none, so that a run that is cut off begins anew."""
    keep_every: Count | None = None
    """Keep every k-th epoch's checkpoint too, for measurements over training."""
    checkpoint_steps: Count | None = None
    """Save after so many steps too, not only after each epoch."""
    checkpoint_seconds: NotNegative = 0.0
    """Save after an epoch only if so many seconds have passed since the last time; after the last one in any case."""
    log_steps: CountOrNone = 20
    """Write the loss and the diagnostics every so many steps; 0 writes none, and no events for TensorBoard."""
    wandb: str | None = None
    """Write the metrics to this project of Weights & Biases too."""
    evaluate_every: Count = 1
    """Evaluate after every k-th epoch, and after the last."""
    probe_examples: CountOrNone = 500
    """Training examples on which ‖∇L‖ and the curvature along it are measured at each evaluation; 0 measures none."""
    trace_probes: CountOrNone = 0
    """Random probes of the Hessian's trace, measured on the same examples after the last epoch; 0 measures none."""
    devices: Count | None = None
    """Use the first so many devices; all by default."""
    distributed: bool = False
    """One of several processes. On TPU pods and under Slurm the rest is found out."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    num_processes: Count | None = None
    process_id: CountOrNone | None = None

    def check_together(self) -> None:
        """Raises ValueError for settings that exclude each other; see :func:`experiments.settings.ranges.check`."""
        for name in ("coordinator", "num_processes", "process_id"):
            if getattr(self, name) is not None and not self.distributed:
                raise ValueError(f"{option(name)} is for one of several processes: add --distributed.")
        if self.trace_probes == 1:
            raise ValueError("--trace-probes must be 0, or at least 2 for an error bar, got 1.")
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise ValueError(
                f"--process-id must be less than --num-processes, which is {self.num_processes}, got {self.process_id}."
            )


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Compare:
    """What is compared, and how. Run it with `python -m experiments compare NAME`."""

    methods: tuple[str, ...] = ("base", "base-3x", "sam", "crsam")
    """Arms: a method, with -Nx for N times the epochs, with ,key=value for settings of its own; all is every method."""
    seeds: Count = 5
    """Runs of each arm. The seed sets wrong labels, subset, initial weights and the order of the batches."""
    first_seed: CountOrNone = 0
    """The least of the seeds; searches use those from 100 on."""
    against: tuple[str, ...] = ()
    """The arms that the others' differences are taken to, seed by seed; the first of all by default."""
    budget: Literal["epochs", "evaluations", "seconds"] = "epochs"
    """What all arms have alike. Of evaluations or seconds, measured in a short pilot, they have what the most expensive
    arm needs; the others train for more epochs."""
    detect: Positive = 0.5
    """Difference of accuracy, in points, for which the number of seeds is estimated."""
    processes: Count = 1
    """Run so many trainings at once, one core each."""


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Tune:
    """What is searched, and how. Run it with `python -m experiments tune NAME`."""

    methods: tuple[str, ...] = ("base", "sam", "crsam")
    """Arms, as in compare."""
    trials: Count = 16
    """Settings tried for each arm, a power of two: the first points of a scrambled Sobol sequence."""
    seeds: Count = 2
    """Runs of each setting, with seeds from 100 on, which comparisons do not use."""
    space: tuple[str, ...] = ()
    """Ranges as key=low:high, searched on a logarithmic scale. They replace the default ranges or add to them."""
    sobol_seed: CountOrNone = 0
    """Seed of the Sobol sequence, for independent searches; the seeds of the runs begin at 100 + SOBOL_SEED · SEEDS."""
    share_points: bool = False
    """Try the same learning rates and radii ρ for all methods (of equal ranges). The settings that only some of them
    have, such as α and β, then keep the recipe's values in the first round."""
    second_round: CountOrNone = 0
    """Further trials of each arm around its best four, where all of its settings are searched; a multiple of four."""
    processes: Count = 1
    """Run so many trainings at once, one core each."""

    def check_together(self) -> None:
        """Raises ValueError for settings that exclude each other; see :func:`experiments.settings.ranges.check`."""
        if self.second_round % 4:
            raise ValueError(f"--second-round must be a multiple of four, got {self.second_round}.")


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The cost of one step. Run it with `python -m experiments benchmark`."""

    model: str = "convnet"
    """A network of experiments.networks, such as convnet, resnet18 or vit_ti4."""
    width: Count | None = None
    """Channels of the first convolution, or features of a token; the network's own by default, 32 of the ConvNet."""
    depth: Count | None = None
    """Blocks of a vision transformer; 12 by default."""
    batch_size: Count = 64
    """Images in a step, on all devices together."""
    image_size: Count = 32
    """Side of the images in pixels."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the network computes; parameters and losses are float32."""
    rounds: Several = 20
    """How often each program is timed."""
    conditional: bool = False
    """Also time CR-SAM inside a conditional, as the policies choose inside a jitted step: slow on CPU."""
    target: str | None = None
    """Do not time, but compile for another device: h100, or a topology of TPUs such as v5e:2x2."""
    devices: Count = 1
    """How many devices of the target share the batch."""
    communication: bool = False
    """With --target: compare what the methods send between devices, with parameters on each device and with FSDP."""
    all: bool = False
    """Time the main methods on four networks on the device at hand, the most important first; the same command resumes.
    Of the options above only ROUNDS counts."""
    budget: Positive = 450.0
    """With --all: begin no program that is not expected to end after so many seconds in all."""
    page: Path | None = None
    """With --all: put the table into this page too, between its marks."""
    out: Path | None = None
    """Write the table to this CSV file too; with --all results/benchmark.csv by default, written row by row."""

    def check_together(self) -> None:
        """Raises ValueError for settings that exclude each other; see :func:`experiments.settings.ranges.check`."""
        if self.all and self.target is not None:
            raise ValueError("--all times the device at hand, --target compiles for another: give one of them.")
        if self.communication and (self.target is None or self.devices == 1):
            raise ValueError("--communication is what several devices of a --target send: give it and --devices.")
        if self.page is not None and not self.all:
            raise ValueError("--page is for the tables of --all.")


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Readiness:
    """What full-size runs take. Run it with `python -m experiments readiness`."""

    teraflops: Positive = 100.0
    """Sustained throughput of the device or of all devices together, 10¹² FLOP/s; a third of the peak is usual."""
    compile: bool = False
    """Compile each step, for its memory: minutes each on a CPU. For the backend at hand, or for ``target``."""
    target: str | None = None
    """Compile for another device, and say if its memory is enough: h100, or a topology of TPUs such as v5e:4x4."""
    devices: Count | None = None
    """How many devices of the target share the batch; by default all of a topology, or one h100."""
    out: Path | None = None
    """Write the table to this file too."""


@_without_prefix
@dataclasses.dataclass(frozen=True)
class Figures:
    """Settings of `python -m experiments figures`. They are saved beside the numbers, which belong to them."""

    epochs: tuple[int, ...] = ()
    """Epochs to measure, of those whose checkpoints were kept; all by default."""
    train_examples: Count = 500
    """Training images on which curvature is measured, the same number of each class, without augmentation."""
    test_examples: Count = 500
    """Test images on which it is measured."""
    num_probes: Several = 16
    """Random probes of the Hessian's trace."""
    num_steps: Count = 20
    """Lanczos steps for the largest eigenvalue."""
    ratio_examples: Count = 320
    """Training images for the approximation ratio, in batches of the size trained with."""
    ratio_rho: Positive = 0.05
    """Radius of the approximation ratio, the same for all methods."""
    surface_points: Several = 21
    """Points of the loss surface along each axis."""
    surface_extent: Positive = 1.0
    """The surface reaches from minus to plus this; 1 changes each filter by its own norm."""
    batch_size: Count = 250
    """Images at once; changes nothing but memory and time."""
