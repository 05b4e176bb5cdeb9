"""Time and temporary memory of each method and evaluation on the device at hand, in plain gradient evaluations.

The floor is one evaluation of the loss and its gradient per point: two for SAM, three for CR-SAM. All programs
run in turn, so that a busy machine slows all of them alike; compare medians within one run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import crsam_jax
from experiments.benchmark.methods import Method, make_step, methods
from experiments.benchmark.problem import LossFn, batch, initial, make_loss
from experiments.configs import Benchmark
from experiments.progress import track
from experiments.tables import markdown


class Timing(NamedTuple):
    """One row: a program on a device. Times are of one step, over all rounds."""

    device: str
    model: str
    batch_size: int
    dtype: str
    program: str
    points: int
    """Gradient evaluations that it cannot do without."""
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    evaluations: float
    """Its median over that of one gradient evaluation."""
    over_floor: float
    """Its median over that of as many gradient evaluations as points."""
    temporary_bytes: int
    compile_seconds: float
    """With tracing and lowering."""


class _Program(NamedTuple):
    """A compiled function with its arguments, and how many times a measurement calls it."""

    name: str
    compiled: Any
    args: tuple[Any, ...]
    calls: int
    points: int
    compile_seconds: float

    def run(self) -> float:
        """Runs it and returns the seconds until the last result is there."""
        start = time.perf_counter()
        for _ in range(self.calls):
            jax.block_until_ready(self.compiled(*self.args))
        return time.perf_counter() - start


def timings(config: Benchmark) -> list[Timing]:
    """Compiles all programs, then times them in turn."""
    if config.devices != 1:
        raise ValueError("--devices is for a --target; times are those of one device.")
    programs = _programs(config)
    seconds: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in track(range(config.rounds), "timing", "rounds"):
        for program in programs:
            seconds[program.name].append(program.run())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    device = jax.devices()[0]
    rows = []
    for program in programs:
        low, middle, high = (
            1e3 * second for second in statistics.quantiles(seconds[program.name], n=4, method="inclusive")
        )
        rows.append(
            Timing(
                device.device_kind if device.platform != "cpu" else "cpu",
                config.model,
                config.batch_size,
                config.dtype,
                program.name,
                program.points,
                middle,
                low,
                high,
                median[program.name] / median[_gradients(1)],
                median[program.name] / median[_gradients(program.points)],
                program.compiled.memory_analysis().temp_size_in_bytes,
                program.compile_seconds,
            )
        )
    return rows


def table(rows: Sequence[Timing]) -> str:
    """The rows as Markdown."""
    titles = ("program", "median ms", "quartiles ms", "evals", "÷ floor", "temporaries MB", "compile s")
    cells = [
        (
            row.program,
            f"{row.median_ms:.1f}",
            f"{row.lower_quartile_ms:.1f} to {row.upper_quartile_ms:.1f}",
            f"{row.evaluations:.2f}",
            f"{row.over_floor:.2f}",
            f"{row.temporary_bytes / 1e6:.1f}",
            f"{row.compile_seconds:.1f}",
        )
        for row in rows
    ]
    first = rows[0]
    return (
        f"{first.model}, batch {first.batch_size}, {first.dtype}, on {first.device}\n\n{markdown(titles, cells)}\n"
        f"evals: median over that of {_gradients(1)}; ÷ floor: over as many evaluations as points"
    )


def _gradients(calls: int) -> str:
    return f"{calls} × value_and_grad"


def _programs(config: Benchmark) -> list[_Program]:
    loss_fn = make_loss(config)
    params, model_state = jax.jit(lambda: initial(config))()
    inputs = jax.jit(lambda: batch(config))()

    def gradient(params: Any, model_state: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss_fn, has_aux=True)(params, model_state, **batch)

    plain = (params, model_state, inputs)
    compiled, seconds = _compiled(gradient, plain)
    programs = [_Program(_gradients(calls), compiled, plain, calls, calls, seconds) for calls in (1, 2, 3)]
    base = optax.identity()
    compared = methods(loss_fn, base) + ([_conditional(loss_fn)] if config.conditional else [])
    for name, tx, points, _ in track(compared, "compiling", "programs"):
        args = (params, model_state, tx.init(params), inputs)
        compiled, seconds = _compiled(make_step(loss_fn, tx), args)
        programs.append(_Program(name, compiled, args, 1, points, seconds))
    for program in programs:
        program.run()  # warm up
    return programs


def _conditional(loss_fn: LossFn) -> Method:
    """CR-SAM as the policies choose it inside a jitted step."""
    member = crsam_jax.crsam(loss_fn, execution=crsam_jax.Execution("sequential"), has_aux=True)
    return Method("crsam in lax.cond", crsam_jax.periodic(member, k=1), 3)


def _compiled(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - start
