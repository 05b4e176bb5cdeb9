"""The study: which method helps, and at what cost, with equal tuning and many seeds. Its protocol is docs/study.md."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from experiments import recipes
from experiments.compare import compare
from experiments.configs import Compare, Run, Tune
from experiments.mechanism import mechanism
from experiments.names import unknown
from experiments.overrides import find
from experiments.recipes import Recipe
from experiments.tune import tune

MAIN = ("base", "base,ema=0.99", "sam", "asam", "crsam", "sam-late", "crsam-late", "msam", "s2sam")
"""Each is tuned on its own, with the same number of trials."""

SECONDARY = (
    "base-2x", "base-3x", "sam-1.5x", "gsam", "wsam", "look-sam", "ae-sam", "crsam-linear", "crsam-eq7",
    "crsam,crsam.alpha=0,crsam.beta=0", "crsam,crsam.beta=0", "crsam,crsam.alpha=0", "crsam-random", "crsam-look",
    "crsam-ae",
)  # fmt: skip
"""They take what was found for base, SAM or CR-SAM."""


AGAINST = ("sam", "base", "crsam,crsam.alpha=0,crsam.beta=0")
"""To the last, SAM at CR-SAM's own settings, a difference is what the penalty does."""


class Task(NamedTuple):
    """What is learned.

    Attributes:
      recipe: of all arms, before tuning.
      trial_seeds: runs of each setting in the search.
      seeds: runs of each arm in the comparison, with other seeds.
    """

    recipe: Recipe
    trial_seeds: int
    seeds: int


def _small(dataset: Any, epochs: int, **changes: Any) -> Recipe:
    """A ResNet-8 of width 8 on some hundred images a class, with a tenth of the training data held out."""
    recipe = recipes.get("cifar10-resnet8")
    settings: dict[str, Any] = {"batch_size": 32, "validation_fraction": 0.1, "test_examples_per_class": 500}
    # The order in which the committed results were made: another rounds otherwise.
    settings["crsam"] = dataclasses.replace(recipe.crsam, strategy="sequential")
    return dataclasses.replace(recipe, dataset=dataset, epochs=epochs, **(settings | changes))


def _small_vit() -> Recipe:
    """A ViT of width 48 and depth 3 on 1,000 images."""
    recipe = recipes.get("fashion-small-vit")
    return dataclasses.replace(
        recipe, examples_per_class=100, validation_fraction=0.1, test_examples_per_class=500,
        model_options={"width": 48, "depth": 3, "num_heads": 3, "patch_size": 7},
    )  # fmt: skip


TASKS: dict[str, Task] = {
    "digits": Task(dataclasses.replace(recipes.get("digits"), per_method={}), trial_seeds=3, seeds=100),
    "cifar10": Task(_small("cifar10", 12), trial_seeds=2, seeds=10),
    "cifar10-augmented": Task(_small("cifar10", 40, augmentation="basic"), trial_seeds=2, seeds=10),
    "fashion-noise": Task(
        _small("fashion_mnist", 16, examples_per_class=100, label_noise=0.4), trial_seeds=2, seeds=10
    ),
    "fashion-vit": Task(_small_vit(), trial_seeds=2, seeds=10),
}  # fmt: skip
"""By name; they take from twenty minutes to three hours on one core."""


def study(name: str, processes: int = 1, out: Path | None = None, trials: int = 16, seeds: int | None = None) -> Path:
    """Tune the main methods of a task of docs/study.md and compare all methods with fresh seeds, or go on with it.

    Args:
      name: The task.
      processes: Run so many trainings at once, one core each.
      out: Folder of the results; results/study/NAME by default.
      trials: Settings tried for each main method.
      seeds: Runs of each arm in the comparison; the task's own number by default.

    Raises:
      ValueError: for an unknown task.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task, folder = TASKS[name], out or Path("results/study") / name
    once = Run(keep=None, log_steps=0, probe_examples=0)
    search = Tune(MAIN, trials, task.trial_seeds, processes=processes)
    found = tune(name, task.recipe, search, {}, dataclasses.replace(once, out=folder / "tune"))
    tuned = find(str(found / f"{name}-tuned.json"))
    longest = 3 * tuned.epochs
    last = dataclasses.replace(
        once, evaluate_every=longest, probe_examples=500, trace_probes=10, out=folder / "compare"
    )
    arms = Compare(MAIN + SECONDARY, seeds or task.seeds, AGAINST, processes=processes)
    return mechanism(compare(name, tuned, arms, {}, last), tuned=MAIN)
