"""What a step costs: time on this machine's device, or kernels and cycles as the compiler of another device plans them.

The floor of a method is as many evaluations of the loss and its gradient, or as many steps of SGD, as it has points:
two for SAM, three for CR-SAM. On this machine all programs run in turn, so that a busy machine slows all of them
alike; compare medians within one run. For another device the whole training step is compiled. A GPU's small kernels
cost some microseconds each whatever they do, so what a method adds to its gradients shows in their number; a TPU's
compiler estimates cycles. SGD has momentum, and params, model and optimizer state are donated.
"""

import math
import time
import timeit
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import crsam_jax
from experiments.costs import communication, suite
from experiments.costs.steps import (
    LossFn,
    Method,
    batch,
    crsam,
    initial,
    make_loss,
    make_step,
    make_train_step,
    methods,
    write,
)
from experiments.costs.targets import Target, by_name, count, find
from experiments.settings import configs, ranges
from experiments.system import tables
from experiments.system.progress import track

Row = dict[str, Any]
"""Of the CSV file, by column."""


def benchmark(config: configs.Benchmark = configs.Benchmark()) -> None:  # noqa: B008
    """Time one step of each method against plain gradient evaluations, with peak temporary memory.

    Args:
      config: What to time.
    """
    ranges.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # or there would be no compilation to time
    if config.all:
        tables.show(suite.table(suite.run(config)))
        return
    if config.communication:
        tables.show(communication.table(communication.communication(config)), keys=2)
        return
    if config.target is not None:
        tables.show(cost_table(costs(config)))
        return
    rows = timings(config)
    tables.show(timing_table(rows))
    write(config, rows)


class _Program(NamedTuple):
    """A compiled function with its arguments, and how many times a measurement calls it."""

    name: str
    points: int
    calls: int
    run: Callable[[], Any]
    temporary_bytes: int
    compile_seconds: float


def timings(config: configs.Benchmark) -> list[Row]:
    """Compiles all programs, then times them in turn: a row of each, times of one step over all rounds."""
    if config.devices != 1:
        raise ValueError("--devices is for a --target; times are those of one device.")
    programs = _programs(config)
    seconds = [
        [timeit.timeit(program.run, number=program.calls) for program in programs]
        for _ in track(range(config.rounds), "timing", "rounds")
    ]
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
            "temporary_bytes": program.temporary_bytes,
            "compile_seconds": program.compile_seconds,  # with tracing and lowering
        }
        for program, low, median, high in zip(programs, lows, medians, highs, strict=True)
    ]


def _programs(config: configs.Benchmark) -> list[_Program]:
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


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], int, float]:
    """What calls it and waits for the last result, its temporary memory, and the seconds until it was compiled."""
    start = time.perf_counter()
    compiled: Any = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    run = lambda: jax.block_until_ready(compiled(*args))
    return run, compiled.memory_analysis().temp_size_in_bytes, seconds


def timing_table(rows: Sequence[Row]) -> str:
    """The rows of this machine's device as Markdown."""
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
    first = rows[0]
    title = f"{first['model']}, batch {first['batch_size']}, {first['dtype']}, on {first['device']}"
    note = f"evals: median over that of {_gradients(1)}; ÷ floor: over as many evaluations as points"
    return _table(title, cells, note)


def _gradients(calls: int) -> str:
    return f"{calls} × value_and_grad"


def costs(config: configs.Benchmark) -> list[Row]:
    """Compiles all programs: a row of each with what the compiler planned, written as soon as it is there."""
    target = find(config.target or "", config.devices)
    loss_fn = make_loss(config)
    base = optax.sgd(0.1, momentum=0.9)
    compared = [Method("SGD", optax.with_extra_args_support(base), 1), *methods(loss_fn, base)]
    if config.devices % 2 == 0:
        with_probe_axis = optax.chain(crsam(loss_fn, probe_axis="probe"), base)
        compared.append(Method("crsam, probe axis", with_probe_axis, 3, has_probe_axis=True))
    leaves = len(jax.tree.leaves(jax.eval_shape(lambda: initial(config))[0]))
    rows: list[Row] = []
    for method in track(compared, "compiling", "programs"):
        compiled, seconds = _planned(config, target, loss_fn, method)
        counts = count(compiled.as_text())
        cost = getattr(counts, target.unit)
        over_sgd = cost / (rows[0]["cost"] if rows else cost)
        row = {
            "target": target.name,
            "devices": config.devices,
            "model": config.model,
            "batch_size": config.batch_size,  # images in a step, on all devices together
            "dtype": config.dtype,
            "leaves": leaves,  # arrays of parameters
            "program": method.name,
            "points": method.points,
            "unit": target.unit,  # kernels of a GPU, or estimated cycles of a TPU
            "cost": cost,
            "over_sgd": over_sgd,
            "over_floor": over_sgd / method.points,  # over as many steps of SGD as points
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,  # of each device
            "collectives": by_name(counts.collectives),
            "collective_bytes": by_name(counts.collective_bytes),  # of whole arrays
            "sent_bytes": counts.sent_bytes,  # by each device, by rings
            "compile_seconds": seconds,  # with tracing and lowering
            # Of each device; NaN where the compiler does not say, as that for GPUs.
            "flops": (compiled.cost_analysis() or {}).get("flops", math.nan),
        }
        rows.append(row)
        write(config, rows)
    return rows


def _planned(config: configs.Benchmark, target: Target, loss_fn: LossFn, method: Method) -> tuple[Any, float]:
    """The compiled training step, and the seconds that it took."""
    train = make_train_step(loss_fn, method.tx)
    target = target.with_probe_axis() if method.has_probe_axis else target
    params, model_state = jax.eval_shape(lambda: initial(config))
    state = target.placed((params, model_state, jax.eval_shape(method.tx.init, params)))
    inputs = target.placed(jax.eval_shape(lambda: batch(config)), target.mesh.axis_names)
    jitted = jax.jit(train, donate_argnums=(0, 1, 2), out_shardings=target.everywhere)
    start = time.perf_counter()
    with jax.set_mesh(target.mesh):
        compiled = target.compile(jitted.lower(*state, inputs))
    return compiled, time.perf_counter() - start


def cost_table(rows: Sequence[Row]) -> str:
    """The rows of another device as Markdown."""
    first = rows[0]
    cost, unit, digits = ("cycles M", 1e6, ".2f") if first["unit"] == "cycles" else ("launches", 1, ",.0f")
    cells = [
        {
            "program": row["program"],
            cost: f"{row['cost'] / unit:{digits}}",
            "÷ SGD": f"{row['over_sgd']:.2f}",
            "÷ floor": f"{row['over_floor']:.2f}",
            "GFLOP a device": "–" if math.isnan(row["flops"]) else f"{row['flops'] / 1e9:,.1f}",
            "temporaries MB": f"{row['temporary_bytes'] / 1e6:,.0f}",
            "collectives": row["collectives"] or "–",
            "a device sends MB": f"{row['sent_bytes'] / 1e6:,.1f}" if row["sent_bytes"] else "–",
            "compile s": f"{row['compile_seconds']:.1f}",
        }
        for row in rows
    ]
    title = f"{first['model']}, {first['leaves']} leaves, batch {first['batch_size']}, {first['dtype']}, "
    title += first["target"] + (f", {first['devices']} devices" if first["devices"] > 1 else "")
    return _table(title, cells, "÷ floor: over as many steps of SGD as points")


def _table(title: str, cells: Sequence[dict[str, str]], note: str) -> str:
    known = [name for name in cells[0] if any(row[name] != "–" for row in cells)]
    lines = [[row[name] for name in known] for row in cells]
    return f"{title}\n\n{tables.markdown(known, lines)}\n{note}"
