"""The ranges of all options: what is out of range is refused by name, before any data is read or anything compiled."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.configs import Benchmark, Compare, Readiness, Run, Tune
from experiments.figures.settings import Figures
from experiments.overrides import flat
from experiments.recipes import Recipe


class Range(NamedTuple):
    """Numbers from ``low`` on and below ``high``, the ends included or not.

    Example:
      >>> print(Range(0, 1, with_high=False), Range(1), Range(0, with_low=False), sep="; ")
      in [0, 1); at least 1; greater than 0
    """

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def holds(self, number: float) -> bool:
        """Whether a number is finite and in the range."""
        is_above = number >= self.low if self.with_low else number > self.low
        is_below = number <= self.high if self.with_high else number < self.high
        return math.isfinite(number) and is_above and is_below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}" if self.with_low else f"greater than {self.low:g}"
        return f"in {'[' if self.with_low else '('}{self.low:g}, {self.high:.10g}{']' if self.with_high else ')'}"


_COUNT, _MAYBE_NONE, _POSITIVE = Range(1), Range(0), Range(0, with_low=False)
_BELOW_1, _SHARE = Range(0, 1, with_high=False), Range(0, 1)

RANGES: dict[type, dict[str, Range]] = {
    Recipe: {
        "epochs": _COUNT, "batch_size": _COUNT, "learning_rate": _MAYBE_NONE, "weight_decay": _MAYBE_NONE,
        "momentum": _BELOW_1, "warmup_epochs": _MAYBE_NONE, "ema": _BELOW_1, "sam.rho": _MAYBE_NONE,
        "asam.rho": _MAYBE_NONE, "asam.eta": _MAYBE_NONE, "crsam.rho": _MAYBE_NONE, "crsam.alpha": _MAYBE_NONE,
        "crsam.beta": _MAYBE_NONE, "crsam.offset": _MAYBE_NONE, "crsam.max_penalty_ratio": _MAYBE_NONE,
        "msam.rho": _MAYBE_NONE, "s2sam.rho": _MAYBE_NONE, "late_start": _SHARE,
        "seed": Range(0, 2**31 - 1), "accumulate": _COUNT, "examples_per_class": _COUNT,
        "test_examples_per_class": _COUNT, "label_noise": _SHARE, "validation_fraction": _BELOW_1,
        "image_size": _COUNT,
    },
    Run: {
        "workers": _MAYBE_NONE, "keep": _COUNT, "keep_every": _COUNT, "checkpoint_steps": _COUNT,
        "checkpoint_seconds": _MAYBE_NONE, "log_steps": _MAYBE_NONE, "evaluate_every": _COUNT,
        "probe_examples": _MAYBE_NONE, "trace_probes": _MAYBE_NONE, "devices": _COUNT, "num_processes": _COUNT,
        "process_id": _MAYBE_NONE,
    },
    Compare: {"seeds": _COUNT, "detect": _POSITIVE, "processes": _COUNT},
    Tune: {"trials": _COUNT, "seeds": _COUNT, "processes": _COUNT},
    Benchmark: {
        "width": _COUNT, "batch_size": _COUNT, "image_size": _COUNT, "rounds": Range(2), "devices": _COUNT,
    },
    Readiness: {"teraflops": _POSITIVE, "devices": _COUNT},
    Figures: {
        "train_examples": _COUNT, "test_examples": _COUNT, "num_probes": Range(2), "num_steps": _COUNT,
        "ratio_examples": _COUNT, "ratio_rho": _POSITIVE, "surface_points": Range(2), "surface_extent": _POSITIVE,
        "batch_size": _COUNT,
    },
}  # fmt: skip
"""Of each class of settings, by dotted name."""

_OF_SMALL_DATA: Mapping[str, Any] = {
    "examples_per_class": None, "test_examples_per_class": None, "label_noise": 0.0, "validation_fraction": 0.0,
}  # fmt: skip


def check(*settings: Any) -> None:
    """Checks all numbers of some settings, and what cannot stand together.

    Raises:
      ValueError: naming the first option that is out of its range, with the range.

    Example:
      >>> check(Compare(seeds=0))
      Traceback (most recent call last):
      ValueError: --seeds must be at least 1, got 0.
    """
    for one in settings:
        values = flat(one)
        for name, allowed in RANGES[type(one)].items():
            value = values[name]
            if value is not None and not allowed.holds(value):
                raise ValueError(f"{_option(name)} must be {allowed}, got {value:.10g}.")
        if isinstance(one, Recipe):
            _check_recipe(one)
        if isinstance(one, Run):
            _check_run(one)


def _check_recipe(recipe: Recipe) -> None:
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(
            f"--warmup-epochs must be less than --epochs, which is {recipe.epochs}, got {recipe.warmup_epochs:g}."
        )
    for name, value in recipe.model_options.items():
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if not isinstance(number, str) and number < 1:
                raise ValueError(f"{_option('model_options.' + name)} must be at least 1, got {value}.")
    if recipe.dataset == "imagenet2012":
        for name, default in _OF_SMALL_DATA.items():
            if getattr(recipe, name) != default:
                raise ValueError(f"{_option(name)} is not for imagenet2012, which is streamed whole.")


def _check_run(run: Run) -> None:
    for name in ("coordinator", "num_processes", "process_id"):
        if getattr(run, name) is not None and not run.distributed:
            raise ValueError(f"{_option(name)} is for one of several processes: add --distributed.")
    if run.trace_probes == 1:
        raise ValueError("--trace-probes must be 0, or at least 2 for an error bar, got 1.")
    if run.num_processes is not None and run.process_id is not None and run.process_id >= run.num_processes:
        raise ValueError(
            f"--process-id must be less than --num-processes, which is {run.num_processes}, got {run.process_id}."
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
