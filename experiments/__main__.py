"""The command line: ``python -m experiments --help``."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import configs

Experiment = tyro.conf.Positional[Literal["digits"]]
Settings = Annotated[configs.Digits, tyro.conf.arg(name="")]
BenchmarkSettings = Annotated[configs.Benchmark, tyro.conf.arg(name="")]


def compare(experiment: Experiment, config: Settings = configs.Digits(), out: Path | None = None) -> None:  # noqa: B008
    """Train methods × seeds under the same settings; print a table, write metrics (CSV), settings, table and plot.

    Args:
        experiment: What to train on: scikit-learn's handwritten digits, which need no download.
        config: The settings.
        out: Folder for the results; a new one under results/ by default.
    """
    from experiments.compare import compare

    compare(config, out)


def tune(experiment: Experiment, config: Settings = configs.Digits(), out: Path | None = None) -> None:  # noqa: B008
    """Search learning rate, radius and penalty weights on the validation split; the test split is not read.

    Args:
        experiment: What to train on.
        config: The settings around the search.
        out: Folder for the results; a new one under results/ by default.
    """
    from experiments.tune import tune

    tune(config, out)


def benchmark(config: BenchmarkSettings = configs.Benchmark()) -> None:  # noqa: B008
    """Time one step of each method against plain gradient evaluations, with peak temporary memory.

    Args:
        config: What to time.
    """
    from experiments.benchmark import benchmark

    benchmark(config)


def main() -> int:
    """Runs one subcommand; an error that the user can mend is one line, not a traceback."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"compare": compare, "tune": tune, "benchmark": benchmark},
            prog="python -m experiments",
            description="Experiments around crsam_jax.",
        )
    except (FileExistsError, FloatingPointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
