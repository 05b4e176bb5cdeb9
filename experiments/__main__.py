"""The command line: ``python -m experiments --help``."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from experiments import configs, recipes
from experiments.figures.settings import Figures, What

Experiment = tyro.conf.Positional[Literal["digits"]]
Settings = Annotated[configs.Digits, tyro.conf.arg(name="")]
BenchmarkSettings = Annotated[configs.Benchmark, tyro.conf.arg(name="")]
Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
Run = Annotated[configs.Run, tyro.conf.arg(name="")]
RecipeFields = Annotated[recipes.Recipe, tyro.conf.arg(name="")]


def compare(experiment: Experiment, config: Settings = configs.Digits(), out: Path | None = None) -> None:  # noqa: B008
    """Train methods × seeds under the same settings; print a table, write metrics (CSV), settings, table and plot.

    Args:
        experiment: What to train on: scikit-learn's handwritten digits, which need no download; or a recipe: see
            `compare RECIPE --help`.
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


def evaluate(
    folder: tyro.conf.Positional[Path],
    on: Literal["test", "imagenet-c", "imagenet-r"] = "test",
    step: int | None = None,
    run: Run = configs.Run(),  # noqa: B008
) -> None:
    """Evaluate a checkpoint: accuracy and loss.

    Args:
        folder: Of the run.
        on: Its own evaluation data, or ImageNet's corruptions or renditions.
        step: Of the checkpoint; the last by default.
        run: Devices and data.
    """
    from experiments.evaluate import evaluate_run

    evaluate_run(folder, on, step, run)


def list_recipes() -> None:
    """List the recipes."""
    from rich.console import Console
    from rich.table import Column, Table

    titles = ("epochs", "batch", "rate", "decay", "ρ SAM", "ρ", "α", "β")
    table = Table(
        Column("name", no_wrap=True),
        *titles,
        box=None,
        caption="rate: peak learning rate; decay: weight decay; ρ, α, β: CR-SAM's",
    )
    for name, r in recipes.RECIPES.items():
        numbers = (r.epochs, r.batch_size, r.learning_rate, r.weight_decay, r.sam.rho)
        penalty = (r.crsam.rho, r.crsam.alpha, r.crsam.beta)
        table.add_row(name, *(f"{number:g}" for number in numbers + penalty))
    Console().print(table)


def readiness(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    config: Annotated[configs.Readiness, tyro.conf.arg(name="")] = configs.Readiness(),  # noqa: B008
) -> None:
    """Print parameters, FLOPs and memory of a step, and hours on a device, without training.

    Args:
        names: Recipes; the rows of the paper by default.
        config: The device.
    """
    from experiments.readiness import readiness

    readiness(names, config)


def contact_sheet(
    dataset: tyro.conf.Positional[Literal["cifar10", "cifar100", "fashion_mnist"]],
    out: Path = Path("contact-sheet.png"),
    data_dir: Path | None = None,
    seed: int = 0,
) -> None:
    """Draw training images, and what each augmentation makes of them.

    Args:
        dataset: Whose images.
        out: The picture to write.
        data_dir: Folder of the data sets that TFDS prepared.
        seed: Of the random choices.
    """
    from experiments.augment.contact_sheet import draw_contact_sheet
    from experiments.data import vision

    draw_contact_sheet(out, vision.load(dataset, data_dir), seed=seed)
    print(f"Drawn: {out}")


def train_command(default: recipes.Recipe) -> Callable[..., None]:
    """The subcommand train, with a recipe's values as defaults."""

    def train(name: Name, recipe: RecipeFields = default, run: Run = configs.Run()) -> None:  # noqa: B008
        """Train one network. After an interruption the same command goes on where the run was.

        Args:
            name: The recipe; `list` shows all. The defaults below are its own.
            recipe: What to train.
            run: How.
        """
        from experiments.train import train

        train(name, recipe, run)

    return train


def compare_command(default: recipes.Recipe) -> Callable[..., None]:
    """The subcommand compare for recipes."""

    def compare(
        name: Name,
        recipe: RecipeFields = default,
        run: Run = configs.Run(),  # noqa: B008
        methods: tuple[str, ...] = ("base", "sam", "crsam"),
        seeds: int = 3,
    ) -> None:
        """Train methods × seeds of a recipe, or go on with it; write a table (mean ± std), CSV and a plot.

        Args:
            name: The recipe.
            recipe: What to train, but for method and seed.
            run: How.
            methods: To compare.
            seeds: How many of each: 0, 1, ...
        """
        from experiments.compare_recipes import compare

        compare(name, recipe, methods, seeds, run)

    return compare


def main() -> int:
    """Runs one subcommand; an error that the user can mend is one line, not a traceback."""
    try:
        name = _recipe_name(sys.argv[1:])
        recipe = recipes.get(name or "cifar10-resnet18")
        commands = {
            "train": train_command(recipe),
            "evaluate": evaluate,
            "compare": compare_command(recipe) if name else compare,
            "list": list_recipes,
            "readiness": readiness,
            "contact-sheet": contact_sheet,
            "tune": tune,
            "benchmark": benchmark,
            "figures": figures,
        }
        _keep_compiled_programs()
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m experiments", description="Experiments around crsam_jax."
        )
    except (FileExistsError, FileNotFoundError, FloatingPointError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _recipe_name(args: list[str]) -> str | None:
    """The recipe that a command line names, whose values become the options' defaults."""
    names_one = len(args) > 1 and args[0] in ("train", "compare") and not args[1].startswith("-")
    return args[1] if names_one and args[1] != "digits" else None


def _keep_compiled_programs() -> None:
    """A run that goes on, and the next seed, need not compile again; $JAX_COMPILATION_CACHE_DIR takes precedence."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "crsam_jax" / "compiled"))


if __name__ == "__main__":
    sys.exit(main())
