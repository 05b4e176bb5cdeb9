"""The subcommands, and what their errors look like."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from experiments import arms, configs, recipes
from experiments.figures.settings import Figures, What
from experiments.overrides import find, flat, parse, read
from experiments.quiet import quiet_libraries

BenchmarkSettings = Annotated[configs.Benchmark, tyro.conf.arg(name="")]
Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
Names = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME")]
Run = Annotated[configs.Run, tyro.conf.arg(name="")]
RecipeFields = Annotated[recipes.Recipe, tyro.conf.arg(name="")]
Overrides = Annotated[configs.Overrides, tyro.conf.arg(name="")]
Compare = Annotated[configs.Compare, tyro.conf.arg(name="")]
Tune = Annotated[configs.Tune, tyro.conf.arg(name="")]

_MANY = configs.Run(checkpoint_seconds=60.0, log_steps=0)  # what fits runs of a minute
_TRIALS = dataclasses.replace(_MANY, keep=None)
_ONCE = dataclasses.replace(_TRIALS, evaluate_every=1_000_000, probe_examples=0)  # after the last epoch alone


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
        folder: The folder of the run.
        on: Its own evaluation data, or ImageNet's corruptions or renditions.
        step: The step of the checkpoint; the last by default.
        run: Devices and data.
    """
    from experiments.evaluate import evaluate_run

    evaluate_run(folder, on, step, run)


def export(
    folder: tyro.conf.Positional[Path], out: Path | None = None, step: int | None = None, average: bool = False
) -> None:
    """Write the parameters of a run as a safetensors file.

    Args:
        folder: The folder of the run.
        out: The file; FOLDER/params.safetensors by default.
        step: The step of the checkpoint; the last by default.
        average: Write the averaged weights.
    """
    from experiments.export import export

    export(folder, out, step, average)


def list_recipes() -> None:
    """List the recipes."""
    from experiments import tables

    titles = ("name", "epochs", "batch", "rate", "decay", "ρ SAM", "ρ", "α", "β")
    rows = []
    for name, r in recipes.RECIPES.items():
        numbers = (r.epochs, r.batch_size, r.learning_rate, r.weight_decay, r.sam.rho)
        rows.append([name, *(f"{number:g}" for number in (*numbers, r.crsam.rho, r.crsam.alpha, r.crsam.beta))])
    caption = "rate: peak learning rate; decay: weight decay; ρ, α, β: CR-SAM's"
    tables.show(f"{tables.markdown(titles, rows)}\n{caption}")


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
        dataset: The data set whose images are drawn.
        out: The picture to write.
        data_dir: Folder of the data sets that TFDS prepared.
        seed: The seed of the random choices.
    """
    from experiments.augment.contact_sheet import draw_contact_sheet
    from experiments.data import vision

    draw_contact_sheet(out, vision.load(dataset, data_dir), seed=seed)
    print(f"Drawn: {out}")


def study(
    name: tyro.conf.Positional[str],
    processes: int = 1,
    out: Path | None = None,
    trials: int = 16,
    seeds: int | None = None,
) -> None:
    """Tune the main methods of a task of docs/study.md and compare all methods with fresh seeds, or go on with it.

    Args:
        name: The task.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results; results/study/NAME by default.
        trials: Settings tried for each main method.
        seeds: Runs of each arm in the comparison; the task's own number by default.
    """
    from experiments.study import study

    study(name, processes, out, trials, seeds)


def sensitivity(
    name: Name, seeds: int = 10, processes: int = 1, out: Path | None = None,
) -> None:  # fmt: skip
    """Train CR-SAM over grids of its settings, or go on with it, and draw heat maps of the accuracy.

    Args:
        name: The recipe, or a file.
        seeds: Runs of each point.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results; results/NAME/sensitivity by default.
    """
    from experiments.sensitivity import sensitivity

    title = _title(name)
    run = dataclasses.replace(_ONCE, out=out or Path("results") / title / "sensitivity")
    sensitivity(title, find(name), seeds, processes, run)


def train_command(default: recipes.Recipe) -> Callable[..., None]:
    """The subcommand train, with a recipe's values as defaults."""

    def train(
        name: Name,
        recipe: RecipeFields = default,
        overrides: Overrides = configs.Overrides(),  # noqa: B008
        run: Run = configs.Run(),  # noqa: B008
    ) -> None:
        """Train one network. After an interruption the same command goes on where the run was.

        Args:
            name: The recipe, or a file: `list` shows all, `tune` writes files, a run's config.json is one.
            recipe: What to train; the defaults are the recipe's own.
            overrides: Changes to it.
            run: How.
        """
        from experiments.train import train

        changes = _changes(recipe, overrides)
        base = find(name)
        method, seed = changes.get("method", base.method), changes.get("seed", base.seed)
        train(_title(name), arms.resolve(base, method, changes, seed), run)

    return train


def compare_command(default: recipes.Recipe) -> Callable[..., None]:
    """The subcommand compare, with a recipe's values as defaults."""

    def compare(
        names: Names, recipe: RecipeFields = default, overrides: Overrides = configs.Overrides(),  # noqa: B008
        config: Compare = configs.Compare(), run: Run = _MANY,  # noqa: B008
    ) -> None:  # fmt: skip
        """Train methods × seeds, or go on with it; write tables (CSV, Markdown) with paired differences, and plots.

        Args:
            names: Recipes, or files; a comparison each.
            recipe: What to train, but for method and seed; the defaults are those of the first recipe.
            overrides: Changes to all of them.
            config: What to compare.
            run: How.
        """
        from experiments.compare import compare

        changes = _changes(recipe, overrides, without=("method", "seed"))
        for name in names:
            out = run.out / _title(name) if run.out and len(names) > 1 else run.out
            compare(_title(name), find(name), config, changes, dataclasses.replace(run, out=out))

    return compare


def tune_command(default: recipes.Recipe) -> Callable[..., None]:
    """The subcommand tune, with a recipe's values as defaults."""

    def tune(
        name: Name, recipe: RecipeFields = default, overrides: Overrides = configs.Overrides(),  # noqa: B008
        config: Tune = configs.Tune(), run: Run = _TRIALS,  # noqa: B008
    ) -> None:  # fmt: skip
        """Search settings of each method on held-out training data, or go on with it; the test data is not read.

        Args:
            name: The recipe, or a file.
            recipe: What to train, but for method and seed; the defaults are the recipe's own.
            overrides: Changes to it.
            config: What to search.
            run: How.
        """
        from experiments.tune import tune

        changes = _changes(recipe, overrides, without=("method", "seed"))
        tune(_title(name), find(name), config, changes, run)

    return tune


def main() -> int:
    """Runs one subcommand; an error that the user can mend is one line, not a traceback."""
    try:
        name = _recipe_name(sys.argv[1:])
        recipe = find(name or "digits")
        commands: dict[str, Callable[..., Any]] = {
            "train": train_command(recipe),
            "compare": compare_command(recipe),
            "tune": tune_command(recipe),
            "study": study,
            "sensitivity": sensitivity,
            "evaluate": evaluate,
            "export": export,
            "list": list_recipes,
            "readiness": readiness,
            "contact-sheet": contact_sheet,
            "benchmark": benchmark,
            "figures": figures,
        }
        _keep_compiled_programs()
        quiet_libraries()
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m experiments", description="Experiments around crsam_jax."
        )
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (FloatingPointError, ImportError, OSError, ValueError) as error:
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 1
    return 0


def _in_words(error: Exception) -> str:
    """What an error says; one of the system without its number, and with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _recipe_name(args: list[str]) -> str | None:
    """The recipe that a command line names first, whose values become the options' defaults."""
    names_one = len(args) > 1 and args[0] in ("train", "compare", "tune") and not args[1].startswith("-")
    return args[1] if names_one else None


def _title(name: str) -> str:
    """What a recipe, or a file with one, is called in folders."""
    return Path(name).stem if name.endswith(".json") else name


def _changes(recipe: recipes.Recipe, overrides: configs.Overrides, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What was asked for, by dotted name: in a file, then by --set, then by options; later ones count.

    Options are those on the command line, so that one counts even if its value is the recipe's: it may not be that of
    ``per_method``.
    """
    given = {token.partition("=")[0].removeprefix("--").replace("-", "_") for token in sys.argv if token[:2] == "--"}
    options = {key: value for key, value in flat(recipe).items() if key in given}
    changes = (read(overrides.config) if overrides.config else {}) | parse(overrides.set) | options
    for key in without:
        if key in changes:
            raise ValueError(f"{key} is for train; here there are --methods and --seeds.")
    return changes


def _keep_compiled_programs() -> None:
    """A run that goes on, and the next seed, need not compile again; $JAX_COMPILATION_CACHE_DIR takes precedence."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "crsam_jax" / "compiled"))
