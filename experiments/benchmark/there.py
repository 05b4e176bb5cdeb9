"""The whole training step of each method, compiled for a device that is not here.

A GPU's small kernels cost some microseconds each whatever they do, so what a method adds to its gradients shows in
their number; a TPU's compiler estimates cycles. The floor is as many steps of SGD as a method has points: two for SAM,
three for CR-SAM. SGD has momentum, and params, model and optimizer state are donated.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from experiments.benchmark.methods import Method, make_step, methods, with_probe_axis
from experiments.benchmark.problem import LossFn, batch, initial, make_loss
from experiments.configs import Benchmark
from experiments.progress import track
from experiments.tables import markdown
from experiments.targets import Target, count, find


class Cost(NamedTuple):
    """One row: a program on a target."""

    target: str
    devices: int
    model: str
    batch_size: int
    """Images in a step, on all devices together."""
    dtype: str
    leaves: int
    """Arrays of parameters."""
    program: str
    points: int
    unit: Literal["launches", "cycles"]
    """Kernels of a GPU, or estimated cycles of a TPU."""
    cost: int
    over_sgd: float
    """The cost over that of SGD."""
    over_floor: float
    """The cost over that of as many steps of SGD as points."""
    temporary_bytes: int
    """Temporary memory of each device."""
    collectives: str
    compile_seconds: float
    """With tracing and lowering."""
    flops: float
    """Floating-point operations of each device; NaN where the compiler does not say, as that for GPUs."""


def costs(config: Benchmark) -> list[Cost]:
    """Compiles all programs and reads what the compiler planned."""
    target = find(config.target or "", config.devices)
    loss_fn = make_loss(config)
    base = optax.sgd(0.1, momentum=0.9)
    compared = [Method("SGD", optax.with_extra_args_support(base), 1), *methods(loss_fn, base)]
    if config.devices % 2 == 0:
        compared.append(with_probe_axis(loss_fn, base))
    plans = [_planned(config, target, loss_fn, method) for method in track(compared, "compiling", "programs")]
    leaves = len(jax.tree.leaves(jax.eval_shape(lambda: initial(config))[0]))
    return [
        Cost(
            target.name,
            config.devices,
            config.model,
            config.batch_size,
            config.dtype,
            leaves,
            method.name,
            method.points,
            target.unit,
            plan.cost,
            plan.cost / plans[0].cost,
            plan.cost / plans[0].cost / method.points,
            plan.temporary_bytes,
            plan.collectives,
            plan.seconds,
            plan.flops,
        )
        for method, plan in zip(compared, plans, strict=True)
    ]


def table(rows: Sequence[Cost]) -> str:
    """The rows as Markdown."""
    first = rows[0]
    in_millions = first.unit == "cycles"
    titles = (
        "program", "cycles M" if in_millions else "launches", "÷ SGD", "÷ floor", "GFLOP a device", "temporaries MB",
        "collectives", "compile s",
    )  # fmt: skip
    cells = [
        (
            row.program,
            f"{row.cost / 1e6:.2f}" if in_millions else f"{row.cost:,}",
            f"{row.over_sgd:.2f}",
            f"{row.over_floor:.2f}",
            "–" if math.isnan(row.flops) else f"{row.flops / 1e9:,.1f}",
            f"{row.temporary_bytes / 1e6:,.0f}",
            row.collectives or "–",
            f"{row.compile_seconds:.1f}",
        )
        for row in rows
    ]
    title = f"{first.model}, {first.leaves} leaves, batch {first.batch_size}, {first.dtype}, {first.target}"
    title += f", {first.devices} devices" if first.devices > 1 else ""
    return f"{title}\n\n{markdown(titles, cells)}\n÷ floor: over as many steps of SGD as points"


class _Plan(NamedTuple):
    cost: int
    temporary_bytes: int
    collectives: str
    seconds: float
    flops: float


def _planned(config: Benchmark, target: Target, loss_fn: LossFn, method: Method) -> _Plan:
    target = target.with_probe_axis() if method.has_probe_axis else target
    params, model_state = jax.eval_shape(lambda: initial(config))
    state = target.placed((params, model_state, jax.eval_shape(method.tx.init, params)))
    inputs = target.placed(jax.eval_shape(lambda: batch(config)), target.mesh.axis_names)
    start = time.perf_counter()
    step = jax.jit(_training_step(loss_fn, method), donate_argnums=(0, 1, 2), out_shardings=target.everywhere)
    with jax.set_mesh(target.mesh):
        compiled = target.compile(step.lower(*state, inputs))
    seconds = time.perf_counter() - start
    counts = count(compiled.as_text())
    return _Plan(
        getattr(counts, target.unit),
        compiled.memory_analysis().temp_size_in_bytes,
        ", ".join(f"{number} {name}" for name, number in counts.collectives.items()),
        seconds,
        (compiled.cost_analysis() or {}).get("flops", float("nan")),
    )


def _training_step(loss_fn: LossFn, method: Method) -> Callable[..., Any]:
    step = make_step(loss_fn, method.tx)

    def train(params: Any, model_state: Any, opt_state: Any, batch: Any) -> Any:
        updates, model_state, opt_state, loss = step(params, model_state, opt_state, batch)
        return optax.apply_updates(params, updates), model_state, opt_state, loss

    return train
