"""Time and temporary memory of each method and evaluation on the device at hand, in plain gradient evaluations.

The floor is one evaluation of the loss and its gradient per point: two for SAM, three for CR-SAM. All programs
run in turn, so that a busy machine slows all of them alike; compare medians within one run.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import crsam_jax
from experiments.benchmark.steps import Method, batch, crsam, initial, make_loss, make_step, methods
from experiments.configs import Benchmark
from experiments.progress import track
from experiments.tables import markdown


class _Program(NamedTuple):
    """A compiled function with its arguments, and how many times a measurement calls it."""

    name: str
    points: int
    calls: int
    compiled: Any
    args: tuple[Any, ...]
    compile_seconds: float

    def run(self) -> float:
        """Runs it and returns the seconds until the last result is there."""
        start = time.perf_counter()
        for _ in range(self.calls):
            jax.block_until_ready(self.compiled(*self.args))
        return time.perf_counter() - start


def measured(config: Benchmark) -> list[dict[str, Any]]:
    """Compiles all programs, then times them in turn: a row of each, times of one step over all rounds."""
    if config.devices != 1:
        raise ValueError("--devices is for a --target; times are those of one device.")
    programs = _programs(config)
    seconds = [[program.run() for program in programs] for _ in track(range(config.rounds), "timing", "rounds")]
    lows, medians, highs = (1e3 * np.quantile(seconds, (0.25, 0.5, 0.75), axis=0)).tolist()
    device = jax.devices()[0]
    return [
        {
            "device": device.device_kind if device.platform != "cpu" else "cpu",
            "model": config.model,
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "program": program.name,
            "points": program.points,  # gradient evaluations that it cannot do without
            "median_ms": median,
            "lower_quartile_ms": low,
            "upper_quartile_ms": high,
            "evaluations": median / medians[0],  # over one gradient evaluation, the first program
            "over_floor": median / medians[program.points - 1],  # over as many evaluations as points
            "temporary_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
            "compile_seconds": program.compile_seconds,  # with tracing and lowering
        }
        for program, low, median, high in zip(programs, lows, medians, highs, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cells = [
        {
            "program": row["program"],
            "median ms": f"{row['median_ms']:.1f}",
            "quartiles ms": f"{row['lower_quartile_ms']:.1f} to {row['upper_quartile_ms']:.1f}",
            "evals": f"{row['evaluations']:.2f}",
            "÷ floor": f"{row['over_floor']:.2f}",
            "temporaries MB": f"{row['temporary_bytes'] / 1e6:.1f}",
            "compile s": f"{row['compile_seconds']:.1f}",
        }
        for row in rows
    ]
    titles, lines = list(cells[0]), [list(row.values()) for row in cells]
    first = rows[0]
    return (
        f"{first['model']}, batch {first['batch_size']}, {first['dtype']}, on {first['device']}\n\n"
        f"{markdown(titles, lines)}\n"
        f"evals: median over that of {_gradients(1)}; ÷ floor: over as many evaluations as points"
    )


def _gradients(calls: int) -> str:
    return f"{calls} × value_and_grad"


def _programs(config: Benchmark) -> list[_Program]:
    """Plain evaluations first: one, two, three."""
    loss_fn = make_loss(config)
    params, model_state = jax.jit(lambda: initial(config))()
    inputs = jax.jit(lambda: batch(config))()
    plain = _compiled(jax.value_and_grad(loss_fn, has_aux=True), params, model_state, *inputs.values())
    programs = [_Program(_gradients(calls), calls, calls, *plain) for calls in (1, 2, 3)]
    compared = methods(loss_fn, optax.identity())
    if config.conditional:  # as the policies choose it inside a jitted step
        conditional = crsam_jax.periodic(crsam(loss_fn, "sequential"), k=1)
        compared.append(Method("crsam in lax.cond", conditional, 3))
    for name, tx, points, _ in track(compared, "compiling", "programs"):
        step = _compiled(make_step(loss_fn, tx), params, model_state, tx.init(params), inputs)
        programs.append(_Program(name, points, 1, *step))
    for program in programs:
        program.run()  # warm up
    return programs


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, tuple[Any, ...], float]:
    """The compiled function, its arguments, and the seconds that it took."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, args, time.perf_counter() - start
