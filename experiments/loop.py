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
from rich.console import Console

from crsam_jax.curvature import normalized_hessian_trace
from experiments import scale
from experiments.checkpoints import Checkpoints
from experiments.configs import Run
from experiments.inputs import Batch, Inputs
from experiments.judge import evaluate
from experiments.logs import EpochRow, Log, diagnostics
from experiments.mismatch import Watch
from experiments.optimizers import evaluations_per_step
from experiments.program import Program, State, averaged
from experiments.progress import Bar, Clock
from experiments.recipes import Recipe


class Training(NamedTuple):
    """All that a run needs beside its state; without checkpoints if they are None."""

    recipe: Recipe
    run: Run
    inputs: Inputs
    program: Program
    checkpoints: Checkpoints | None
    log: Log
    console: Console

    @property
    def steps_per_epoch(self) -> int:
        """As its name says."""
        return self.inputs.signature.steps_per_epoch


def run_steps(training: Training, state: State) -> tuple[State, int]:
    """Trains from the state to the last epoch, or to a signal.

    What a step or an epoch showed is on disk before the checkpoint that follows it, so that going on at a checkpoint
    leaves no gap.

    Returns:
      The last state, and the number of the signal or 0.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    recipe, run, inputs, program, _, log, console = training
    per_epoch, first = training.steps_per_epoch, int(state.step)
    total = recipe.epochs * per_epoch
    clock, saved, watch = Clock(), time.monotonic(), Watch(state.opt_state)
    with caught_signals() as signals, Bar(console, total, first) as bar:
        for step in range(first + 1, total + 1):
            start = time.perf_counter()
            feed = inputs.feed(step - 1)
            clock.count(time.perf_counter() - start)
            state = program.step(state, feed)
            is_end, is_logged = step % per_epoch == 0, bool(run.log_steps) and step % run.log_steps == 0
            is_evaluated = step == total or step % (per_epoch * run.evaluate_every) == 0
            if step == first + 1:
                bar.update(step, *_texts(state, recipe, per_epoch, clock))
                if not is_end:  # where there is other time to measure
                    clock.restart()  # without the compilation
            if is_logged:
                log.step(step, {"loss": float(state.loss)} | diagnostics(state.opt_state))
            if is_logged or is_end:
                _check_finite(state, training)
                bar.update(step, *_texts(state, recipe, per_epoch, clock))
            if is_end and (warning := watch.warning(state.opt_state)):
                bar.print(warning)
            if is_evaluated:
                row = _epoch_row(training, state, clock)
                log.epoch(row)
                bar.print(_line(row))
            stop = scale.agreed(signals, is_due=is_end or is_logged)
            if stop or step == total or _is_save_due(run, step, per_epoch, saved):
                _save(training, state)
                saved = time.monotonic()
            if stop:
                return state, stop
            if is_evaluated:
                clock.restart()
    return state, 0


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects the first SIGTERM or SIGINT in a list, or one that was held back before; the second acts as ever.

    What comes within a second of the first is the same one, sent to this process and passed on to it.
    """
    caught: list[int] = []
    heard = 0.0
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def catch(number: int, frame: object) -> None:
        nonlocal heard
        if not caught:
            caught.append(number)
            heard = time.monotonic()
        elif time.monotonic() - heard > 1:
            restore()
            signal.raise_signal(number)

    for kind in kinds:
        signal.signal(kind, catch)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, kinds)
    try:
        yield caught
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        restore()


def _epoch_row(training: Training, state: State, clock: Clock) -> EpochRow:
    recipe, run, inputs, program, *_ = training
    step, per_epoch = int(state.step), training.steps_per_epoch  # waits for the epoch's last step
    speed, waiting, epoch = clock.steps_per_second, clock.waiting_percent, step // per_epoch
    epochs = epoch - (epoch - 1) // run.evaluate_every * run.evaluate_every  # since the row before
    params, model_state = program.weights(state), state.model_state
    test = evaluate(program.judge, params, model_state, inputs.evaluation())
    row = EpochRow(
        epoch=epoch,
        step=step,
        train_loss=float(state.loss_sum) / per_epoch,
        train_accuracy=100 * float(state.correct) / (per_epoch * recipe.batch_size),
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        learning_rate=float(program.schedule(step - 1)),
        images_per_second=recipe.batch_size * speed,
        waiting_percent=waiting,
        seconds=epochs * per_epoch / speed,
        evaluations_per_step=evaluations_per_step(recipe, state.opt_state),
        calibration_error=test.calibration_error,
    )
    if state.average is not None:
        params, model_state = averaged(state)
        average = evaluate(program.judge, params, model_state, inputs.evaluation())
        row = row._replace(**{f"average_{name}": value for name, value in average._asdict().items()})
    examples = inputs.examples(run.probe_examples) if run.probe_examples else None
    return row if examples is None else row._replace(**_measured(training, params, model_state, examples, row.epoch))


def _measured(training: Training, params: Any, model_state: Any, examples: Batch, epoch: int) -> dict[str, Any]:
    """Gradient norm, and curvature along the gradient; after the last epoch the Hessian's trace too."""
    grad_norm, curvature = training.program.judge.probe(params, model_state, examples)
    result = {"grad_norm": float(grad_norm), "curvature": float(curvature)}
    if training.run.trace_probes and epoch == training.recipe.epochs:
        trace = normalized_hessian_trace(
            training.program.judge.loss, params, {"model_state": model_state, "batch": examples},
            key=jax.random.key(0), num_probes=training.run.trace_probes,
        )  # fmt: skip
        result |= {"trace": trace.trace.mean, "normalized_trace": trace.mean}
    return result


def _texts(state: State, recipe: Recipe, per_epoch: int, clock: Clock) -> tuple[str, ...]:
    """What stands beside the bar, the most important first; waits for the step."""
    step, loss_sum = int(state.step), float(state.loss_sum)
    done = (step - 1) % per_epoch + 1
    return (
        f"epoch {(step - 1) // per_epoch + 1}/{recipe.epochs}",
        f"loss {loss_sum / done:.3f}",
        f"accuracy {100 * float(state.correct) / (done * recipe.batch_size):.1f} %",
        f"{recipe.batch_size * clock.steps_per_second:.0f} images/s",
    )


def _line(row: EpochRow) -> str:
    """What remains of an epoch."""
    return (
        f"epoch {row.epoch}: training loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.2f} %; "
        f"test loss {row.test_loss:.4f}, accuracy {row.test_accuracy:.2f} %; {row.images_per_second:.0f} images/s, "
        f"{row.waiting_percent:.1f} % of it waiting for data"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _is_save_due(run: Run, step: int, per_epoch: int, saved: float) -> bool:
    if run.checkpoint_steps and step % run.checkpoint_steps == 0:
        return True
    if run.keep_every and step % (run.keep_every * per_epoch) == 0:
        return True
    return step % per_epoch == 0 and time.monotonic() - saved >= run.checkpoint_seconds


def _check_finite(state: State, training: Training) -> None:
    step = int(state.bad_step)
    if step >= 0:
        raise _not_finite("loss is not finite in", step, training)


def _save(training: Training, state: State) -> None:
    """Saves a state from which training can go on: with finite parameters."""
    _check_finite(state, training)
    if not _all_finite(state.params):
        raise _not_finite("parameters are not finite after", int(state.step), training)
    if training.checkpoints is not None:
        training.checkpoints.save(state, training.inputs.position())


def _not_finite(what: str, step: int, training: Training) -> FloatingPointError:
    checkpoints = training.checkpoints
    last = None if checkpoints is None else checkpoints.last
    return FloatingPointError(
        f"The training {what} step {step} (epoch {(step - 1) // training.steps_per_epoch + 1}). "
        + (f"The last checkpoint is that of step {last}" if last is not None else "There is no checkpoint")
        + (f", in {checkpoints.folder}" if checkpoints is not None else "")
        + f". The run was {json.dumps(dataclasses.asdict(training.recipe))}. A smaller learning rate, rho or penalty "
        "may help."
    )
