"""The command line: ``python -m experiments --help``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import configs, recipes
from experiments.figures.settings import Figures, What

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


def figures(
    what: tyro.conf.Positional[What],
    folder: tyro.conf.Positional[Path],
    settings: Annotated[Figures, tyro.conf.arg(name="")] = Figures(),  # noqa: B008
    out: Path | None = None,
) -> None:
    """Measure curvature and loss surfaces of trained networks, and draw the paper's figures and table 3.

    Args:
        what: One figure, table3, html (surfaces to turn with the mouse), or all figures and the table.
        folder: Folder of the training runs, results/RECIPE.
        settings: What to measure. What was measured before is not measured again.
        out: Folder for numbers and figures; FOLDER/figures by default.
    """
    from experiments.figures.command import figures

    figures(what, folder, settings, out)


def train_command(recipe: recipes.Recipe) -> Callable[..., None]:
    """The subcommand train, with a recipe's values as defaults."""

    def train(
        name: tyro.conf.Positional[str],
        recipe: Annotated[recipes.Recipe, tyro.conf.arg(name="")] = recipe,
        run: Annotated[configs.Run, tyro.conf.arg(name="")] = configs.Run(),  # noqa: B008
    ) -> None:
        """Train one network. After an interruption the same command goes on where the run was.

        Args:
            name: The recipe; `list` shows all.
            recipe: What to train.
            run: How.
        """
        from experiments.train import train

        train(name, recipe, run)

    return train


def main() -> int:
    """Runs one subcommand; an error that the user can mend is one line, not a traceback."""
    try:
        recipe = recipes.get(_recipe_name(sys.argv[1:]))
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": train_command(recipe),
                "compare": compare,
                "tune": tune,
                "benchmark": benchmark,
                "figures": figures,
            },
            prog="python -m experiments",
            description="Experiments around crsam_jax.",
        )
    except (FileExistsError, FileNotFoundError, FloatingPointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _recipe_name(args: list[str]) -> str:
    """The recipe that a command line names; it decides the defaults of the options."""
    if len(args) > 1 and args[0] == "train" and not args[1].startswith("-"):
        return args[1]
    return "cifar10-resnet18"


if __name__ == "__main__":
    sys.exit(main())
