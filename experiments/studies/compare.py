"""Arms × seeds of a recipe: a folder per run, with equal epochs, equal evaluations or equal time."""

import dataclasses
from pathlib import Path

from experiments.settings import ranges
from experiments.settings.configs import Compare, Run
from experiments.settings.overrides import Changes
from experiments.settings.recipes import Recipe
from experiments.settings.suggestions import unknown
from experiments.studies import arms, jobs
from experiments.studies.jobs import Job
from experiments.studies.summary import write_summary
from experiments.training import run_folder
from experiments.training.optimizers import METHODS

Recipes = dict[str, Recipe]  # by arm

_PILOT_EPOCHS = 3  # the first compiles and warms up


def compare(name: str, recipe: Recipe, config: Compare, changes: Changes, run: Run) -> Path:
    """Trains every arm with the same seeds, and returns the folder with all runs, tables and plots.

    Complete runs are read, others resume where they stopped. An interruption of a run in training leaves
    tables of what is complete. The ``changes`` hold for all arms.

    Raises:
      FileExistsError: if a folder holds another run.
      ValueError: for an unknown method or setting.
    """
    ranges.check(config, run)
    names = list(METHODS if config.methods == ("all",) else dict.fromkeys(config.methods))
    against = config.against or names[:1]
    for reference in against:
        if reference not in names:
            raise unknown("arm to take as --against", reference, names)
    folder = run.out or Path("results") / name / "compare"
    recipes = {arm: arms.resolve(recipe, arm, changes, seed=0) for arm in names}
    ranges.check(*recipes.values())
    if config.budget != "epochs":
        recipes = _with_equal_cost(name, recipes, config, folder, run)
    # Seed by seed, so that an interruption leaves comparable runs.
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    todo = [Job.inside(folder, arm, one, seed) for seed in seeds for arm, one in recipes.items()]
    try:
        jobs.carry_out(name, todo, run, config.processes)
    finally:
        complete = [job for job in todo if jobs.is_complete(job)]
        if complete:
            run_folder.save_json(
                {arm: dataclasses.asdict(one) for arm, one in recipes.items()}, folder / "recipes.json"
            )
            labels = {arm: arms.label(recipe, arm) for arm in names}
            write_summary(folder, labels, complete, against, config.detect)
    return folder


def _with_equal_cost(name: str, recipes: Recipes, config: Compare, folder: Path, run: Run) -> Recipes:
    """The recipes with as many epochs as the most expensive one's evaluations, or seconds, are worth.

    A pilot of three epochs of each arm measures its cost; with the folder, pilot and numbers of epochs are kept.
    """
    short = dataclasses.replace(
        run, keep=None, log_steps=0, evaluate_every=_PILOT_EPOCHS, probe_examples=0, trace_probes=0
    )
    cheap = {arm: dataclasses.replace(one, epochs=_PILOT_EPOCHS, warmup_epochs=0.0) for arm, one in recipes.items()}
    pilots = [Job.inside(folder / "pilot", arm, one, seed=0) for arm, one in cheap.items()]
    jobs.carry_out(name, pilots, short, config.processes)
    field = "evaluations_per_step" if config.budget == "evaluations" else "seconds"
    costs = {job.arm: getattr(job.rows[-1], field) for job in pilots}
    total = max(costs[arm] * one.epochs for arm, one in recipes.items())
    return {arm: dataclasses.replace(one, epochs=max(1, round(total / costs[arm]))) for arm, one in recipes.items()}
