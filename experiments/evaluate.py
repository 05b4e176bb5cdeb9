"""Accuracy and loss of a trained network: on its test data, on ImageNet-C and on ImageNet-R."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ranges
from experiments.configs import Run
from experiments.data import imagenet
from experiments.inputs import Batch, streamed_batches
from experiments.judge import Evaluation, evaluate
from experiments.progress import track
from experiments.restore import Restored, restore

On = Literal["test", "imagenet-c", "imagenet-r"]


def evaluate_run(folder: Path, on: On = "test", step: int | None = None, run: Run = Run()) -> Evaluation:  # noqa: B008
    """Evaluate a checkpoint: accuracy and loss.

    Args:
      folder: The folder of the run.
      on: Its own evaluation data, or ImageNet's corruptions (their mean) or renditions (of its 200 classes alone).
      step: The step of the checkpoint; the last by default.
      run: Devices and data.

    Raises:
      FileNotFoundError: if there is no such run, checkpoint or data.
      ValueError: if the network was not trained on ImageNet, and ``on`` is.
    """
    ranges.check(run)
    restored = restore(folder, step, run)
    if on != "test" and restored.recipe.dataset != "imagenet2012":
        raise ValueError(f"{on} is for networks trained on ImageNet; {folder} is of {restored.recipe.dataset}.")
    match on:
        case "test":
            result = _evaluated(restored, restored.inputs.evaluation())
        case "imagenet-c":
            result = _mean(
                [_corrupted(restored, name, run) for name in track(_corruptions(), "ImageNet-C", "corruptions")]
            )
        case "imagenet-r":
            result = _renditions(restored, run)
    print(
        f"{folder}, step {int(restored.state.step)}, {on}: accuracy {result.accuracy:.2f} %, loss {result.loss:.4f}, "
        f"calibration error {result.calibration_error:.4f}"
    )
    return result


def _evaluated(restored: Restored, batches: Iterator[Batch], classes: jax.Array | None = None) -> Evaluation:
    return evaluate(restored.program.judge, restored.state.params, restored.state.model_state, batches, classes)


def _corruptions() -> list[str]:
    return [f"{name}_{severity}" for name in imagenet.CORRUPTIONS for severity in imagenet.SEVERITIES]


def _corrupted(restored: Restored, corruption: str, run: Run) -> Evaluation:
    batches = streamed_batches(restored.recipe, restored.mesh, run, f"imagenet2012_corrupted/{corruption}")
    return _evaluated(restored, batches)


def _renditions(restored: Restored, run: Run) -> Evaluation:
    classes = np.zeros(imagenet.NUM_CLASSES, bool)
    classes[imagenet.classes_present("imagenet_r", "test", run.data_dir)] = True
    batches = streamed_batches(restored.recipe, restored.mesh, run, "imagenet_r", "test")
    return _evaluated(restored, batches, jnp.asarray(classes))


def _mean(results: list[Evaluation]) -> Evaluation:
    return Evaluation(*(statistics.fmean(values) for values in zip(*results, strict=True)))
