"""Training runs by name: every row of the paper's tables 4 and 5, and reduced ones for a CPU.

A row holds the settings of all methods; ``method``, ``augmentation`` and ``seed`` choose one run of it, and
``per_method`` has what a search chose for single methods.
Source of the figures: Wu, Luo, Wunsch, "CR-SAM", AAAI 2024, tables 4 and 5. Where the paper is silent:

* warm-up: 5 epochs for the ResNets on ImageNet (Goyal et al. 2017), 4 for the ViTs, which are 10,000 steps (Chen,
  Hsieh, Gong 2022, who trained the same networks with SAM); none on CIFAR, as in the authors' released script;
* weight decay acts on all parameters, inside SGD's momentum and decoupled in AdamW, as it does by default in PyTorch;
* the penalty is the linear one of the authors' released script, whose ρ, α, β and learning rate are those of one row.
  That the other rows were made with it too is an inference. ``--crsam.penalty log`` is the library's default form, and
  with ``--crsam.offset 0`` the paper's eq. 7.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import tyro

from experiments.settings.ranges import TRACED, Count, NotNegative, Range, Share, ShareBelow1, flat, notes_of, option
from experiments.settings.sources import absolute, in_python_file, there_is_a_path
from experiments.settings.suggestions import unknown

Rate = Annotated[NotNegative, TRACED]
Decay = Annotated[ShareBelow1, TRACED]
ModelOptions = dict[str, int | float | str | tuple[int, ...]]


PRETRAINED = ("efficientnet_lite0",)
"""The networks that there are pretrained weights for."""


@dataclasses.dataclass(frozen=True)
class Sam:
    """Settings of SAM and its one-sided relatives."""

    rho: Rate = 0.05
    """Distance to the probe, ρ."""


@dataclasses.dataclass(frozen=True)
class Asam:
    """Settings of ASAM."""

    rho: Rate = 0.5
    """Distance to the probe in its own metric, ρ."""
    eta: Rate = 0.01
    """Added to the size of each weight, η."""


@dataclasses.dataclass(frozen=True)
class Msam:
    """Settings of MSAM, which perturbs along its momentum."""

    rho: Rate = 0.3
    """Length of the perturbation, ρ."""


@dataclasses.dataclass(frozen=True)
class S2Sam:
    """Settings of S²-SAM, which perturbs along the gradient before."""

    rho: Rate = 0.05
    """Length of the perturbation, ρ."""


@dataclasses.dataclass(frozen=True)
class CrSam:
    """Settings of CR-SAM and its variants."""

    rho: Rate = 0.1
    """Distance to the probes, ρ."""
    alpha: Rate = 0.1
    """Weight of the curvature term, α."""
    beta: Rate = 0.01
    """Weight of the gradient-norm term, β."""
    penalty: Literal["log", "linear"] = "log"
    """Form of the penalty; linear is the authors' released code."""
    offset: Rate = 1.0
    """δ in log(δ + S) and log(δ + D); 0 is the paper's eq. 7."""
    max_penalty_ratio: Rate | None = None
    """Bound κ on ‖penalty's gradient‖/‖g⁺‖."""
    strategy: Literal["auto", "vmap", "sequential", "ordered"] = "auto"
    """In which order the points are evaluated, for speed and memory alone; see ``crsam_jax.Execution``."""


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """What a network depends on beside its data; see the settings of those names in :class:`Recipe`."""

    model: str
    options: ModelOptions = dataclasses.field(default_factory=dict, hash=False)
    dtype: str = "float32"
    batch_norm: str = "global"
    accumulate: int = 1


@tyro.conf.configure(tyro.conf.arg(name=""))
@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run, whole: equal recipes give equal parameters on equal hardware."""

    dataset: str
    """digits, which ships inside scikit-learn; a name of TFDS, such as cifar10; a folder with train/CLASS/*.png; an
    .npz file; or FILE.py:FUNCTION, which returns arrays."""
    model: str
    """A network of experiments.networks, or FILE.py:FUNCTION, which makes one."""
    epochs: Count
    batch_size: Count
    """Images in a step, on all devices together."""
    learning_rate: Rate
    """Peak of the cosine schedule."""
    weight_decay: Rate
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The base: SGD with momentum, or AdamW with β₁ 0.9 and β₂ 0.999."""
    momentum: Decay = 0.9
    """The momentum of SGD."""
    warmup_epochs: NotNegative = 0.0
    """Linear from 0 to the peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine to zero at the last step, or the peak throughout."""
    ema: Decay | None = None
    """Decay of an average of the weights over the steps; it is evaluated beside them, and judged in their place."""
    swa_start: ShareBelow1 | None = None
    """Share of the steps after which the weights of all steps are averaged alike (SWA); judged in their place too."""
    label_smoothing: Decay | None = None
    """Share of each label that the training loss spreads over all classes."""
    method: str = "base"
    """base (the base optimizer alone), sam, crsam, or a relative of theirs."""
    sam: Sam = dataclasses.field(default_factory=Sam)
    asam: Asam = dataclasses.field(default_factory=Asam)
    crsam: CrSam = dataclasses.field(default_factory=CrSam)
    msam: Msam = dataclasses.field(default_factory=Msam)
    s2sam: S2Sam = dataclasses.field(default_factory=S2Sam)
    late_start: Share = 0.85
    """Share of the steps that a late method leaves to the base optimizer."""
    augmentation: Literal["none", "basic", "cutout", "autoaugment", "inception"] = "basic"
    """inception on ImageNet happens in the input pipeline, the others inside the jitted step."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """The seed of initial weights, order, augmentations, subset and label noise."""
    model_options: ModelOptions = dataclasses.field(default_factory=dict, hash=False)
    """Changes to the network, such as its width."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the network computes; parameters and losses are float32."""
    batch_norm: Literal["global", "device"] = "global"
    """What BatchNorm's statistics are taken over: the whole batch, or each device's part."""
    accumulate: Count = 1
    """Parts in which a batch passes the network, one after the other; the perturbation is that of the whole batch."""
    examples_per_class: Count | None = None
    """Train on so many of each class."""
    test_examples_per_class: Count | None = None
    """Evaluate on so many of each class, the same for all seeds."""
    label_noise: Share = 0.0
    """Fraction of the training labels that become wrong."""
    validation_fraction: ShareBelow1 = 0.0
    """Hold out so much of the training data, the same for all seeds."""
    evaluate_on: Literal["test", "validation"] = "test"
    """The test data, or what is held out."""
    image_size: Count = 224
    """Side of ImageNet's crops in pixels; images of a folder or of TFDS that are larger, or of several sizes, become
    squares of it."""
    pretrained: Literal["imagenet"] | None = None
    """Begin at weights that were trained on ImageNet, with a new head; images are then normalized as for these weights,
    and smaller ones are scaled up to IMAGE_SIZE."""
    per_method: Annotated[dict[str, dict[str, Any]], tyro.conf.Suppress] = dataclasses.field(
        default_factory=dict, hash=False
    )
    """Settings of single methods, from their names and the settings' names; their variants take them too."""

    @property
    def network(self) -> NetworkSettings:
        """What the network depends on."""
        return NetworkSettings(self.model, self.model_options, self.dtype, self.batch_norm, self.accumulate)

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that the compiled step takes as inputs, by dotted name."""
        values = flat(self)
        traced = [name for name, notes in notes_of(type(self)).items() if TRACED in notes]
        return {name: values[name] for name in traced if values[name] is not None}

    def with_numbers(self, numbers: Mapping[str, Any]) -> Self:
        """This recipe with other numbers, which may be traced."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in numbers.items():
            group, _, field = name.rpartition(".")
            groups.setdefault(group, {})[field] = value
        own = groups.pop("", {})
        own |= {group: dataclasses.replace(getattr(self, group), **values) for group, values in groups.items()}
        return dataclasses.replace(self, **own)

    def structure(self) -> Self:
        """What the compiled step depends on: runs whose structures are equal share it."""
        zeros = self.with_numbers(dict.fromkeys(self.numbers, 0.0))
        return dataclasses.replace(zeros, seed=0, label_noise=0.0, per_method={})

    def check_together(self) -> None:
        """Raises ValueError for what cannot stand together; see :func:`experiments.settings.ranges.check`."""
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"--warmup-epochs must be less than --epochs, which is {self.epochs}, got {self.warmup_epochs:g}."
            )
        if self.ema is not None and self.swa_start is not None:
            raise ValueError("--ema and --swa-start are two averages of the weights: give one of them.")
        if self.pretrained is not None and (self.model not in PRETRAINED or self.model_options):
            options = " with model options" if self.model_options else ""
            raise ValueError(f"--pretrained is for {', '.join(PRETRAINED)} as it is, got {self.model}{options}.")
        for arm, settings in self.per_method.items():
            if not isinstance(settings, dict):
                raise ValueError(f"per_method.{arm} must be settings by name, got {str(settings)[:100]!r}.")
        if in_python_file(self.model) is None:
            for name, value in self.model_options.items():
                _check_model_option(name, value)
        if self.dataset == "imagenet2012":
            for name in ("examples_per_class", "test_examples_per_class", "label_noise", "validation_fraction"):
                if getattr(self, name):
                    raise ValueError(f"{option(name)} is not for imagenet2012, which is streamed whole.")


_MODEL_OPTIONS: dict[str, str] = {
    "width": "whole number",
    "depth": "whole number",
    "patch_size": "whole number",
    "num_heads": "whole number",
    "alpha": "whole number",
    "widen_factor": "whole number",
    "stage_sizes": "list of whole numbers",
    "stem": "text",
    "zero_init_residual": "truth value",
}
"""The options of all networks, and what each takes."""


def _check_model_option(name: str, value: Any) -> None:
    """Raises ValueError for an option of no network, or a value that it does not take."""
    if name not in _MODEL_OPTIONS:
        raise unknown("model option", name, _MODEL_OPTIONS)
    kind, full = _MODEL_OPTIONS[name], option("model_options." + name)
    numbers = value if isinstance(value, (tuple, list)) else [value]
    fits = {
        "whole number": type(value) is int,
        "list of whole numbers": isinstance(value, (tuple, list))
        and bool(value)
        and all(type(n) is int for n in value),
        "text": isinstance(value, str),
        "truth value": isinstance(value, bool),
    }[kind]
    if not fits:
        raise ValueError(f"{full} must be a {kind}, got {repr(value)[:100]}.")
    if "whole" in kind and not all(1 <= number < 2**31 for number in numbers):
        raise ValueError(f"{full} must be at least 1, got {str(value)[:100]}.")


_TABLE_4 = dict(epochs=200, batch_size=128, learning_rate=0.05, weight_decay=5e-3, augmentation="basic")
_CIFAR10, _CIFAR100 = dict(_TABLE_4, dataset="cifar10"), dict(_TABLE_4, dataset="cifar100")
_TABLE_5 = dict(dataset="imagenet2012", batch_size=512, augmentation="inception")
_IMAGENET_RESNET = dict(_TABLE_5, epochs=90, learning_rate=1.3, weight_decay=3e-5, warmup_epochs=5.0)
_IMAGENET_VIT = dict(_TABLE_5, epochs=300, learning_rate=3e-3, weight_decay=0.3, optimizer="adamw", warmup_epochs=4.0)


def _row(
    common: dict[str, Any], model: str, sam_rho: float, rho: float, alpha: float, beta: float, **fields: Any
) -> Recipe:
    return Recipe(**(common | fields), model=model, sam=Sam(sam_rho), crsam=CrSam(rho, alpha, beta, "linear"))


PAPER: dict[str, Recipe] = {
    "cifar10-resnet18": _row(_CIFAR10, "resnet18", 0.05, 0.10, 0.1, 0.01),
    "cifar100-resnet18": _row(_CIFAR100, "resnet18", 0.10, 0.15, 0.5, 0.01),
    "cifar10-resnet101": _row(_CIFAR10, "resnet101", 0.05, 0.10, 0.2, 0.05),
    "cifar100-resnet101": _row(_CIFAR100, "resnet101", 0.10, 0.15, 0.5, 0.05),
    "cifar10-wrn28-10": _row(_CIFAR10, "wrn28_10", 0.10, 0.10, 0.5, 0.1, weight_decay=1e-3),
    "cifar100-wrn28-10": _row(_CIFAR100, "wrn28_10", 0.10, 0.15, 0.5, 0.1, weight_decay=1e-3),
    "cifar10-pyramidnet110": _row(_CIFAR10, "pyramidnet110", 0.15, 0.20, 0.5, 0.1),
    "cifar100-pyramidnet110": _row(_CIFAR100, "pyramidnet110", 0.15, 0.20, 0.5, 0.1),
    "imagenet-resnet50": _row(_IMAGENET_RESNET, "resnet50", 0.10, 0.15, 0.1, 0.01),
    "imagenet-resnet101": _row(_IMAGENET_RESNET, "resnet101", 0.10, 0.15, 0.2, 0.01),
    "imagenet-vit-s32": _row(_IMAGENET_VIT, "vit_s32", 0.05, 0.10, 0.05, 0.01),
    "imagenet-vit-b32": _row(_IMAGENET_VIT, "vit_b32", 0.05, 0.10, 0.05, 0.01),
}
"""The rows of tables 4 and 5."""

REDUCED: dict[str, Recipe] = {
    "digits": Recipe(  # chosen for single methods by `python -m experiments tune digits --seeds 3`
        "digits",
        "convnet",
        epochs=40,
        batch_size=64,
        learning_rate=0.03,
        weight_decay=5e-4,
        augmentation="none",
        model_options={"width": 16},
        label_noise=0.4,
        validation_fraction=0.5,
        sam=Sam(0.765),
        crsam=CrSam(0.293, 0.135, 0.0526),
        per_method={
            "base": {"learning_rate": 0.0137},
            "sam": {"learning_rate": 0.151},
            "crsam": {"learning_rate": 0.0469},
        },
    ),
    "cifar10-small-resnet": dataclasses.replace(
        PAPER["cifar10-resnet18"],
        model_options={"stage_sizes": (1, 1, 1), "width": 16},
        epochs=10,
        crsam=CrSam(),
        examples_per_class=300,
        batch_size=64,
        weight_decay=5e-4,
    ),
    "cifar10-resnet8": dataclasses.replace(
        PAPER["cifar10-resnet18"],
        model="resnet8",
        model_options={"width": 8, "stem": "imagenet"},
        epochs=24,
        crsam=CrSam(),
        examples_per_class=200,
        test_examples_per_class=200,
        batch_size=64,
        weight_decay=5e-4,
        augmentation="none",
    ),
    "cifar10-5000": Recipe(  # a network that fits; not tuned
        "cifar10",
        "resnet8",
        epochs=30,
        batch_size=128,
        learning_rate=0.05,
        weight_decay=1e-3,
        augmentation="none",
        model_options={"width": 16, "stem": "strided"},
        examples_per_class=500,
        validation_fraction=0.1,
        sam=Sam(0.3),
        crsam=CrSam(0.2, 0.1, 0.01),
    ),
    "fashion-small-vit": Recipe(
        "fashion_mnist",
        "vit_ti4",
        epochs=10,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.05,
        optimizer="adamw",
        warmup_epochs=1.0,
        examples_per_class=300,
        model_options={"width": 96, "depth": 4, "patch_size": 7},
        crsam=CrSam(0.1, 0.05, 0.01),
    ),
    "cifar10-finetune": Recipe(  # not tuned
        "cifar10",
        "efficientnet_lite0",
        epochs=10,
        batch_size=32,
        learning_rate=0.01,
        weight_decay=5e-4,
        crsam=CrSam(0.1, 0.1, 0.01),
        examples_per_class=100,
        test_examples_per_class=200,
        validation_fraction=0.1,
        image_size=64,
        pretrained="imagenet",
    ),
    "digits-convnet": Recipe(
        "digits",
        "convnet",
        epochs=10,
        batch_size=50,
        learning_rate=0.05,
        weight_decay=5e-4,
        augmentation="none",
        model_options={"width": 16},
    ),
}
"""Runs of minutes on a CPU."""

RECIPES: dict[str, Recipe] = PAPER | REDUCED


def for_data(name: str, has_validation: bool) -> Recipe:
    """What data of the user is trained with where no recipe is named: a small ResNet, to be tuned.

    Without validation data of its own a fifth of the training data is held out.
    """
    return Recipe(
        absolute(name),
        "resnet8",
        epochs=30,
        batch_size=64,
        learning_rate=0.05,
        weight_decay=5e-4,
        augmentation="none",
        image_size=64,
        validation_fraction=0.0 if has_validation else 0.2,
    )


def get(name: str) -> Recipe:
    """The recipe of that name; a ValueError has the close names.

    Example:
      >>> get("cifar100-resnet18").crsam.rho
      0.15
    """
    if name not in RECIPES:
        raise ValueError(f"{unknown('recipe', name, RECIPES)}{there_is_a_path(name)}")
    return RECIPES[name]
