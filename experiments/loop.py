"""The training loop: steps, logs, evaluations, checkpoints, and a clean end at a signal."""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from rich.console import Console

from experiments import scale
from experiments.checkpoints import Checkpoints
from experiments.configs import Run
from experiments.inputs import Batch, Inputs
from experiments.logs import EpochRow, Log, diagnostics
from experiments.program import Program, State
from experiments.progress import Bar, Clock
from experiments.recipes import Recipe


class Evaluation(NamedTuple):
    """Mean cross-entropy, and accuracy in percent, over all evaluation data."""

    loss: float
    accuracy: float


def run_steps(
    recipe: Recipe, run: Run, inputs: Inputs, program: Program, state: State, checkpoints: Checkpoints, log: Log,
    console: Console,
) -> tuple[State, int]:  # fmt: skip
    """Trains from the state to the last epoch, or to a signal.

    What a step or an epoch showed is on disk before the checkpoint that follows it, so that going on at a checkpoint
    leaves no gap.

    Returns:
      The last state, and the number of the signal or 0.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    per_epoch, first = inputs.signature.steps_per_epoch, int(state.step)
    total = recipe.epochs * per_epoch
    clock = Clock()
    with caught_signals() as signals, Bar(console, total, first) as bar:
        for step in range(first + 1, total + 1):
            start = time.perf_counter()
            feed = inputs.feed(step - 1)
            clock.count(time.perf_counter() - start)
            state = program.step(state, feed)
            if step == first + 1:
                jax.block_until_ready(state)
                clock.restart()  # without the compilation
            is_end, is_logged = step % per_epoch == 0, step % run.log_steps == 0
            if is_logged:
                _check_finite(state, recipe, checkpoints, per_epoch)
                log.step(step, {"loss": float(state.loss)} | diagnostics(state.opt_state))
                bar.update(step, _text(state, recipe, per_epoch, clock))
            if is_end:
                _check_finite(state, recipe, checkpoints, per_epoch)
                row = _epoch_row(recipe, inputs, program, state, clock)
                log.epoch(row)
                bar.print(row)
            stop = scale.agreed(signals, is_due=is_end or is_logged)
            if is_end or stop or (run.checkpoint_steps and step % run.checkpoint_steps == 0):
                _save(state, inputs.position(), recipe, checkpoints, per_epoch)
            if stop:
                return state, stop
            if is_end:
                clock.restart()
    return state, 0


def evaluate(
    program: Program, state: State, batches: Iterator[Batch], classes: ArrayLike | None = None
) -> Evaluation:  # fmt: skip
    """Evaluates a state over all batches; ``classes`` says which ones may be answered."""
    sums = [np.asarray(program.evaluate(state.params, state.model_state, batch, classes), float) for batch in batches]
    loss, correct, examples = np.sum(sums, axis=0).tolist()
    return Evaluation(loss / examples, 100 * correct / examples)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT in a list; the second acts as ever."""
    caught: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for kind in kinds:
        signal.signal(kind, catch)
    try:
        yield caught
    finally:
        restore()


def _epoch_row(recipe: Recipe, inputs: Inputs, program: Program, state: State, clock: Clock) -> EpochRow:
    step, per_epoch = int(state.step), inputs.signature.steps_per_epoch  # waits for the epoch's last step
    images_per_second, waiting = recipe.batch_size * clock.steps_per_second, clock.waiting_percent
    evaluation = evaluate(program, state, inputs.evaluation())
    return EpochRow(
        epoch=step // per_epoch,
        step=step,
        train_loss=float(state.loss_sum) / per_epoch,
        train_accuracy=100 * float(state.correct) / (per_epoch * recipe.batch_size),
        test_loss=evaluation.loss,
        test_accuracy=evaluation.accuracy,
        learning_rate=float(program.schedule(step - 1)),
        images_per_second=images_per_second,
        waiting_percent=waiting,
    )


def _text(state: State, recipe: Recipe, per_epoch: int, clock: Clock) -> str:
    step = int(state.step)
    done = (step - 1) % per_epoch + 1
    return (
        f"epoch {(step - 1) // per_epoch + 1}/{recipe.epochs}  loss {float(state.loss_sum) / done:.3f}  "
        f"accuracy {100 * float(state.correct) / (done * recipe.batch_size):.1f} %  "
        f"{recipe.batch_size * clock.steps_per_second:.0f} images/s"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_finite(state: State, recipe: Recipe, checkpoints: Checkpoints, per_epoch: int) -> None:
    step = int(state.bad_step)
    if step >= 0:
        raise _not_finite("loss is not finite in", step, recipe, checkpoints, per_epoch)


def _save(state: State, position: Any, recipe: Recipe, checkpoints: Checkpoints, per_epoch: int) -> None:
    """Saves a state from which training can go on: with finite parameters."""
    _check_finite(state, recipe, checkpoints, per_epoch)
    if not _all_finite(state.params):
        raise _not_finite("parameters are not finite after", int(state.step), recipe, checkpoints, per_epoch)
    checkpoints.save(state, position)


def _not_finite(
    what: str, step: int, recipe: Recipe, checkpoints: Checkpoints, per_epoch: int
) -> FloatingPointError:  # fmt: skip
    last = checkpoints.last
    return FloatingPointError(
        f"The training {what} step {step} (epoch {(step - 1) // per_epoch + 1}). "
        + (f"The last checkpoint is that of step {last}, " if last is not None else "There is no checkpoint ")
        + f"in {checkpoints.folder}. The run was {json.dumps(dataclasses.asdict(recipe))}. A smaller learning "
        "rate, rho or penalty may help."
    )
