"""The whole training step of each method, compiled for a device that is not here.

A GPU's small kernels cost some microseconds each whatever they do, so what a method adds to its gradients shows in
their number; a TPU's compiler estimates cycles. The floor is as many steps of SGD as a method has points: two for SAM,
three for CR-SAM. SGD has momentum, and params, model and optimizer state are donated.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import optax

from experiments.benchmark.steps import LossFn, Method, batch, crsam, initial, make_loss, make_step, methods
from experiments.configs import Benchmark
from experiments.progress import track
from experiments.tables import markdown
from experiments.targets import Target, count, find


def measured(config: Benchmark) -> list[dict[str, Any]]:
    """Compiles all programs: a row of each with what the compiler planned."""
    target = find(config.target or "", config.devices)
    loss_fn = make_loss(config)
    base = optax.sgd(0.1, momentum=0.9)
    compared = [Method("SGD", optax.with_extra_args_support(base), 1), *methods(loss_fn, base)]
    if config.devices % 2 == 0:
        with_probe_axis = optax.chain(crsam(loss_fn, probe_axis="probe"), base)
        compared.append(Method("crsam, probe axis", with_probe_axis, 3, has_probe_axis=True))
    leaves = len(jax.tree.leaves(jax.eval_shape(lambda: initial(config))[0]))
    rows: list[dict[str, Any]] = []
    for method in track(compared, "compiling", "programs"):
        start = time.perf_counter()
        compiled = _compiled(config, target.with_probe_axis() if method.has_probe_axis else target, loss_fn, method.tx)
        seconds = time.perf_counter() - start
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
            "collectives": ", ".join(f"{number} {name}" for name, number in counts.collectives.items()),
            "compile_seconds": seconds,  # with tracing and lowering
            # Of each device; NaN where the compiler does not say, as that for GPUs.
            "flops": (compiled.cost_analysis() or {}).get("flops", math.nan),
        }
        rows.append(row)
    return rows


def _compiled(config: Benchmark, target: Target, loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs) -> Any:
    step = make_step(loss_fn, tx)

    def train(params: Any, model_state: Any, opt_state: Any, batch: Any) -> Any:
        updates, model_state, opt_state, loss = step(params, model_state, opt_state, batch)
        return optax.apply_updates(params, updates), model_state, opt_state, loss

    params, model_state = jax.eval_shape(lambda: initial(config))
    state = target.placed((params, model_state, jax.eval_shape(tx.init, params)))
    inputs = target.placed(jax.eval_shape(lambda: batch(config)), target.mesh.axis_names)
    with jax.set_mesh(target.mesh):
        jitted = jax.jit(train, donate_argnums=(0, 1, 2), out_shardings=target.everywhere)
        return target.compile(jitted.lower(*state, inputs))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    first = rows[0]
    in_millions = first["unit"] == "cycles"
    cells = [
        {
            "program": row["program"],
            "cycles M" if in_millions else "launches": f"{row['cost'] / 1e6:.2f}"
            if in_millions
            else f"{row['cost']:,}",
            "÷ SGD": f"{row['over_sgd']:.2f}",
            "÷ floor": f"{row['over_floor']:.2f}",
            "GFLOP a device": "–" if math.isnan(row["flops"]) else f"{row['flops'] / 1e9:,.1f}",
            "temporaries MB": f"{row['temporary_bytes'] / 1e6:,.0f}",
            "collectives": row["collectives"] or "–",
            "compile s": f"{row['compile_seconds']:.1f}",
        }
        for row in rows
    ]
    title = f"{first['model']}, {first['leaves']} leaves, batch {first['batch_size']}, {first['dtype']}, "
    title += first["target"] + (f", {first['devices']} devices" if first["devices"] > 1 else "")
    titles, lines = list(cells[0]), [list(row.values()) for row in cells]
    return f"{title}\n\n{markdown(titles, lines)}\n÷ floor: over as many steps of SGD as points"
