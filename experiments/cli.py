"""The command line: a function a subcommand, whose parameters are its options and whose docstring is its help."""

import ast
import dataclasses
import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.settings import configs, recipes, sources
from experiments.settings.overrides import find, parse, read
from experiments.settings.ranges import flat
from experiments.studies import arms
from experiments.system import home, tables
from experiments.system.quiet import quiet_libraries
from experiments.training import supervisor

COMMANDS = {
    "train": "cli:train",
    "compare": "cli:compare",
    "tune": "cli:tune",
    "study": "studies.study:study",
    "radius": "studies.radius:radius",
    "regimes": "studies.regimes:regimes",
    "stronger": "studies.stronger:stronger",
    "language": "studies.language:language",
    "sensitivity": "cli:sensitivity",
    "evaluate": "training.evaluate:evaluate_run",
    "export": "training.export:export",
    "list": "cli:list_recipes",
    "readiness": "costs.readiness:readiness",
    "contact-sheet": "cli:contact_sheet",
    "benchmark": "costs.benchmark:benchmark",
    "figures": "figures.command:figures",
}
"""Where the functions are. That of the command at hand alone is imported."""

_WITH_RECIPE = ("train", "compare", "tune")

_MANY = configs.Run(checkpoint_seconds=60.0, log_steps=0)  # what fits runs of a minute
_TRIALS = dataclasses.replace(_MANY, keep=None)
_ONCE = dataclasses.replace(_TRIALS, evaluate_every=1_000_000, probe_examples=0)  # after the last epoch alone

Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")]


def train(
    name: Name,
    recipe: recipes.Recipe,
    overrides: configs.Overrides = configs.Overrides(),  # noqa: B008
    run: configs.Run = configs.Run(),  # noqa: B008
) -> None:
    """Train one network. After an interruption the same command goes on where the run was.

    Args:
        name: The recipe (`list` shows all), a JSON file with one (`tune` writes them, a run's config.json is one),
            FILE.py:RECIPE, or own data: a folder of images, an .npz file or tfds:NAME.
        recipe: What to train; the defaults are the recipe's own.
        overrides: Changes to it.
        run: How.
    """
    from experiments.training.train import train

    changes, base = _changes(recipe, overrides), find(name)
    method, seed = changes.get("method", base.method), changes.get("seed", base.seed)
    train(sources.title(name), arms.resolve(base, method, changes, seed), run)


def compare(
    names: Names,
    recipe: recipes.Recipe,
    overrides: configs.Overrides = configs.Overrides(),  # noqa: B008
    config: configs.Compare = configs.Compare(),  # noqa: B008
    run: configs.Run = _MANY,
) -> None:
    """Train methods × seeds, or go on with it; write tables (CSV, Markdown) with paired differences, and plots.

    Args:
        names: Recipes, or files; a comparison each.
        recipe: What to train, but for method and seed; the defaults are those of the first recipe.
        overrides: Changes to all of them.
        config: What to compare.
        run: How.
    """
    from experiments.studies.compare import compare

    changes = _changes(recipe, overrides, without=("method", "seed"))
    for name in names:
        out = run.out / sources.title(name) if run.out and len(names) > 1 else run.out
        compare(sources.title(name), find(name), config, changes, dataclasses.replace(run, out=out))


def tune(
    name: Name,
    recipe: recipes.Recipe,
    overrides: configs.Overrides = configs.Overrides(),  # noqa: B008
    config: configs.Tune = configs.Tune(),  # noqa: B008
    run: configs.Run = _TRIALS,
) -> None:
    """Search settings of each method on held-out training data, or go on with it; the test data is not read.

    Args:
        name: The recipe, or a file.
        recipe: What to train, but for method and seed; the defaults are the recipe's own.
        overrides: Changes to it.
        config: What to search.
        run: How.
    """
    from experiments.studies.tune import tune

    tune(sources.title(name), find(name), config, _changes(recipe, overrides, without=("method", "seed")), run)


def sensitivity(name: Name, seeds: int = 10, processes: int = 1, out: Path | None = None) -> None:
    """Train CR-SAM over grids of its settings, or go on with it, and draw heat maps of the accuracy.

    Args:
        name: The recipe, or a file.
        seeds: Runs of each point.
        processes: Run so many trainings at once, one core each.
        out: Folder of the results; results/NAME/sensitivity by default.
    """
    from experiments.studies.sensitivity import sensitivity

    title = sources.title(name)
    run = dataclasses.replace(_ONCE, out=out or Path("results") / title / "sensitivity")
    sensitivity(title, find(name), seeds, processes, run)


def list_recipes() -> None:
    """List the recipes."""
    columns = {
        "epochs": "epochs",
        "batch": "batch_size",
        "rate": "learning_rate",
        "decay": "weight_decay",
        "ρ SAM": "sam.rho",
        "ρ": "crsam.rho",
        "α": "crsam.alpha",
        "β": "crsam.beta",
    }
    settings = {name: flat(recipe) for name, recipe in recipes.RECIPES.items()}
    rows = [[name, *(f"{own[key]:g}" for key in columns.values())] for name, own in settings.items()]
    caption = "rate: peak learning rate; decay: weight decay; ρ, α, β: CR-SAM's"
    tables.show(tables.markdown(["name", *columns], rows) + "\n" + caption)


def contact_sheet(
    dataset: str,
    out: Path = Path("contact-sheet.png"),
    data_dir: Path | None = None,
    seed: int = 0,
) -> None:
    """Draw training images, and what each augmentation makes of them.

    Args:
        dataset: The data set whose images are drawn, as in a recipe.
        out: The picture to write.
        data_dir: Folder of the data sets that TFDS prepared.
        seed: The seed of the random choices.
    """
    from experiments.data import catalog
    from experiments.networks.augment.contact_sheet import draw_contact_sheet

    draw_contact_sheet(out, catalog.load(dataset, data_dir), seed=seed)
    print(f"Drawn: {out}")


def main() -> int:
    """Runs one subcommand; an error that the user can mend is one line, not a traceback."""
    command, *arguments = sys.argv[1:] or [""]
    try:
        functions = {command: _function(command)} if command in COMMANDS else {name: _stub(name) for name in COMMANDS}
        if command in _WITH_RECIPE:
            # A command line names its recipe first, whose values become the options' defaults.
            recipe = find(arguments[0] if arguments and not arguments[0].startswith("-") else "digits")
            functions[command] = functools.partial(functions[command], recipe=recipe)
        _keep_compiled_programs()
        quiet_libraries()
        tyro.extras.subcommand_cli_from_dict(
            functions,
            prog=_program(),
            description="Experiments around crsam_jax.",
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (FloatingPointError, ImportError, OSError, OverflowError, RecursionError, ValueError) as error:
        supervisor.wait_for_peers_news(error)
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 1
    return 0


def _function(command: str) -> Any:
    module, _, name = COMMANDS[command].partition(":")
    return getattr(importlib.import_module(f"experiments.{module}"), name)


def _stub(command: str) -> Any:
    """A function with the help of a command, read from its source: to import all of them takes seconds."""
    module, _, name = COMMANDS[command].partition(":")
    spec = importlib.util.find_spec(f"experiments.{module}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    [found] = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)

    def stub() -> None:
        """Never called: a command that is named is imported."""

    stub.__doc__ = ast.get_docstring(found)
    return stub


def _program() -> str:
    """How the command was started, for its help."""
    started = Path(sys.argv[0]).name
    return started if started == "crsam-experiments" else "python -m experiments"


def _in_words(error: Exception) -> str:
    """What an error says; one of the system without its number, and with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


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
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := home.cache_folder()):
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
