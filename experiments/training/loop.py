"""The training loop: steps, logs, evaluations, checkpoints, and a clean end at a signal."""

import dataclasses
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from crsam_jax.curvature import normalized_hessian_trace
from experiments.data.inputs import Batch, Inputs
from experiments.settings.configs import Run
from experiments.settings.recipes import Recipe
from experiments.system.interruptions import collected
from experiments.system.progress import Bar, Clock
from experiments.training import devices
from experiments.training.checkpoints import Checkpoints
from experiments.training.judge import evaluate
from experiments.training.logs import EpochRow, Log, diagnostics
from experiments.training.optimizers import evaluations_per_step
from experiments.training.program import Program, State, averaged_network


class Training(NamedTuple):
    """All that a run needs in addition to its state; without checkpoints if they are None."""

    recipe: Recipe
    run: Run
    inputs: Inputs
    program: Program
    checkpoints: Checkpoints | None
    log: Log
    console: Console


def run_steps(training: Training, state: State) -> tuple[State, int]:
    """Trains from the state to the last epoch, or to a signal: the last state, and the number of the signal or 0.

    What a step or an epoch showed is on disk before the checkpoint that follows it, so that resuming from a checkpoint
    leaves no gap.
    """
    recipe, run, inputs, program, _, log, console = training
    per_epoch, first = inputs.signature.steps_per_epoch, int(state.step)
    total = recipe.epochs * per_epoch
    clock, saved, watch = Clock(), time.monotonic(), Watch(state.opt_state)
    with collected() as signals, Bar(console, total, first) as bar:
        for step in range(first + 1, total + 1):
            with clock.waiting():
                feed = inputs.feed(step - 1)
            state = program.step(state, feed)
            is_end, is_logged = step % per_epoch == 0, _is_every(run.log_steps, step)
            is_evaluated = step == total or _is_every(run.evaluate_every * per_epoch, step)
            if is_logged:
                log.step(step, {"loss": float(state.loss)} | diagnostics(state.opt_state))
            if is_logged or is_end or step == first + 1:
                _check_finite(training, state)
                bar.update(step, *_texts(recipe, state, per_epoch, clock))
            if step == first + 1 and not is_end:  # where there is other time to measure
                clock.restart()  # without the compilation
            if is_end and (warning := watch.warning(state.opt_state)):
                bar.print(warning)
            if is_evaluated:
                row = _epoch_row(training, state, clock)
                log.epoch(row)
                bar.print(
                    f"epoch {row.epoch}: training loss {row.train_loss:.4f}, accuracy {row.train_accuracy:.2f} %; test "
                    f"loss {row.test_loss:.4f}, accuracy {row.test_accuracy:.2f} %; {row.images_per_second:.0f} "
                    f"images/s, {row.waiting_percent:.1f} % of it waiting for data",
                    is_progress=True,
                )
            stop = devices.agreed(signals, is_due=is_end or is_logged)
            is_asked = _is_every(run.checkpoint_steps, step) or _is_every((run.keep_every or 0) * per_epoch, step)
            is_time = is_end and bool(devices.decided_by_first(time.monotonic() - saved >= run.checkpoint_seconds))
            if stop or step == total or is_asked or is_time:
                _save(training, state)
                saved = time.monotonic()
            if stop:
                return state, stop
            if is_evaluated:
                clock.restart()
    return state, 0


def _is_every(count: int | None, step: int) -> bool:
    return count is not None and count > 0 and step % count == 0


def _epoch_row(training: Training, state: State, clock: Clock) -> EpochRow:
    recipe, run, inputs, program, *_ = training
    step, per_epoch = int(state.step), inputs.signature.steps_per_epoch  # waits for the epoch's last step
    speed, waiting, epoch = clock.steps_per_second, clock.waiting_percent, step // per_epoch
    epochs = epoch - (epoch - 1) // run.evaluate_every * run.evaluate_every  # since the row before
    weights = program.weights(state), state.model_state
    test = evaluate(program.judge, *weights, inputs.evaluation())
    row = EpochRow(
        epoch,
        step,
        float(state.loss_sum) / per_epoch,
        100 * float(state.correct) / (per_epoch * recipe.batch_size),
        test.loss,
        test.accuracy,
        learning_rate=float(program.schedule(step - 1)),
        images_per_second=recipe.batch_size * speed,
        waiting_percent=waiting,
        seconds=epochs * per_epoch / speed,
        evaluations_per_step=evaluations_per_step(recipe, state.opt_state),
        calibration_error=test.calibration_error,
    )
    if state.average is not None:
        weights = averaged_network(state, program, inputs)
        average = evaluate(program.judge, *weights, inputs.evaluation())
        row = row._replace(**{f"average_{name}": value for name, value in average._asdict().items()})
    examples = inputs.examples(run.probe_examples) if run.probe_examples else None
    return row if examples is None else row._replace(**_measured(training, *weights, examples, epoch))


def _measured(training: Training, params: Any, model_state: Any, examples: Batch, epoch: int) -> dict[str, Any]:
    """Gradient norm, and curvature along the gradient; after the last epoch the Hessian's trace too."""
    grad_norm, curvature = training.program.judge.probe(params, model_state, examples)
    result = {"grad_norm": float(grad_norm), "curvature": float(curvature)}
    if training.run.trace_probes and epoch == training.recipe.epochs:
        trace = normalized_hessian_trace(
            training.program.judge.loss,
            params,
            {"model_state": model_state, "batch": examples},
            key=jax.random.key(0),
            num_probes=training.run.trace_probes,
        )
        result |= {"trace": trace.trace.mean, "normalized_trace": trace.mean}
    return result


def _texts(recipe: Recipe, state: State, per_epoch: int, clock: Clock) -> tuple[str, ...]:
    """The text beside the bar, the most important first; waits for the step."""
    step, loss_sum = int(state.step), float(state.loss_sum)
    done = (step - 1) % per_epoch + 1
    return (
        f"epoch {(step - 1) // per_epoch + 1}/{recipe.epochs}",
        f"loss {loss_sum / done:.3f}",
        f"accuracy {100 * float(state.correct) / (done * recipe.batch_size):.1f} %",
        f"{recipe.batch_size * clock.steps_per_second:.0f} images/s",
    )


def _save(training: Training, state: State) -> None:
    """Saves a state from which training can resume: with finite parameters."""
    _check_finite(training, state)
    if not _all_finite(state.params):
        raise _not_finite("parameters are not finite after", int(state.step), training)
    if training.checkpoints is not None:
        training.checkpoints.save(state, training.inputs.position())


def _check_finite(training: Training, state: State) -> None:
    if (step := int(state.bad_step)) >= 0:
        raise _not_finite("loss is not finite in", step, training)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _not_finite(what: str, step: int, training: Training) -> FloatingPointError:
    checkpoints, epoch = training.checkpoints, (step - 1) // training.inputs.signature.steps_per_epoch + 1
    last = None if checkpoints is None else checkpoints.last
    return FloatingPointError(
        f"The training {what} step {step} (epoch {epoch}). "
        + (f"The last checkpoint is that of step {last}" if last is not None else "There is no checkpoint")
        + (f", in {checkpoints.folder}" if checkpoints is not None else "")
        + f". The run was {json.dumps(dataclasses.asdict(training.recipe))}. A smaller learning rate, rho or penalty "
        "may help."
    )


class Watch:
    """Compares the counts of mismatched steps from epoch to epoch; steps that a policy skips do not count."""

    def __init__(self, opt_state: Any):
        self._before, self._has_warned = _counts(opt_state), False

    def warning(self, opt_state: Any) -> str | None:
        """The warning after an epoch; None if all is well, and after the first warning."""
        now = _counts(opt_state)
        steps, mismatched = (after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        if self._has_warned or 2 * mismatched <= steps:
            return None
        self._has_warned = True
        return (
            f"Warning: in {mismatched} of {steps} steps the gradient did not fit the losses at the probes. Likely "
            "causes: it is scaled, clipped or of other data; the method comes after another transformation; or rho "
            "is far too large."
        )


def _counts(opt_state: Any) -> tuple[int, int]:
    """Full steps so far, and mismatched ones; zeros for the base optimizer, and for methods that cannot tell."""
    for _, state in optax.tree.get_all_with_path(opt_state, "SharpnessAwareState"):
        if hasattr(state.diagnostics, "mismatched_steps"):
            return int(state.step_count), int(state.diagnostics.mismatched_steps)
    return 0, 0
