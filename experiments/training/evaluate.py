"""Accuracy and loss of a trained network: on its test data, on ImageNet-C and on ImageNet-R."""

import statistics
from functools import partial
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from experiments.data import imagenet
from experiments.data.inputs import streamed_batches
from experiments.settings import ranges
from experiments.settings.configs import Run
from experiments.system.progress import track
from experiments.training.judge import Evaluation, evaluate
from experiments.training.restore import restore

On = Literal["test", "imagenet-c", "imagenet-r"]


def evaluate_run(folder: Path, on: On = "test", step: int | None = None, run: Run = Run()) -> Evaluation:  # noqa: B008
    """Evaluate a checkpoint: accuracy and loss.

    Args:
      folder: The folder of the run.
      on: Its own evaluation data, or ImageNet's corruptions (their mean) or renditions (of its 200 classes alone).
      step: The step of the checkpoint; the last by default.
      run: Devices and data.
    """
    ranges.check(run)
    restored = restore(folder, step, run)
    if on != "test" and restored.recipe.dataset != "imagenet2012":
        raise ValueError(f"{on} is for networks trained on ImageNet; {folder} is of {restored.recipe.dataset}.")
    state, judge, classes = restored.state, restored.program.judge, None
    streamed = partial(streamed_batches, restored.recipe, restored.mesh, run)
    match on:
        case "test":
            passes = iter([restored.inputs.evaluation()])
        case "imagenet-c":
            names = [f"{name}_{severity}" for name in imagenet.CORRUPTIONS for severity in imagenet.SEVERITIES]
            passes = (streamed(f"imagenet2012_corrupted/{name}") for name in track(names, "ImageNet-C", "corruptions"))
        case "imagenet-r":
            passes = iter([streamed("imagenet_r", "test")])
            present = imagenet.Reader(run.data_dir).classes_present("imagenet_r", "test")
            classes = jnp.zeros(imagenet.NUM_CLASSES, bool).at[present].set(True)
    found = [evaluate(judge, state.params, state.model_state, batches, classes) for batches in passes]
    result = Evaluation(*map(statistics.fmean, zip(*found, strict=True)))
    print(
        f"{folder}, step {int(restored.state.step)}, {on}: accuracy {result.accuracy:.2f} %, loss {result.loss:.4f}, "
        f"calibration error {result.calibration_error:.4f}"
    )
    return result
