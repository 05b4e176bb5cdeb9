"""What a step costs: time and temporary memory of each method and evaluation, in plain gradient evaluations.

The floor is one evaluation of the loss and its gradient per point: two for SAM, three for CR-SAM. All programs
run in turn, so that a busy machine slows all of them alike; compare medians within one run.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import crsam_jax
from experiments import configs, models, tables
from experiments.models.convnet import ConvNet
from experiments.progress import track

_TITLES = ("program", "median ms", "quartiles", "evals", "÷ floor", "temp. MB", "compile s")

_EVALUATIONS = ("sequential", "ordered", "vmap")


class Program(NamedTuple):
    """A compiled function with its arguments, and how many times a measurement calls it."""

    name: str
    compiled: Any
    args: tuple[Any, ...]
    calls: int
    floor: int
    """Gradient evaluations that it cannot do without."""
    compile_seconds: float
    """With tracing and lowering."""

    def run(self) -> float:
        """Runs it and returns the seconds until the last result is there."""
        start = time.perf_counter()
        for _ in range(self.calls):
            jax.block_until_ready(self.compiled(*self.args))
        return time.perf_counter() - start


def benchmark(config: configs.Benchmark) -> None:
    """Times all programs in turn and prints a table.

    Raises:
      ValueError: if there is no such network.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # or there would be no compilation to time
    programs = _programs(config)
    seconds: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in track(range(config.rounds), "timing", "rounds"):
        for program in programs:
            seconds[program.name].append(program.run())
    device = jax.devices()[0]
    title = (
        f"{config.model}, batch {config.batch_size}, {device.platform} ({device.device_kind}), {config.rounds} rounds"
    )
    caption = "evals: median over that of 1 × value_and_grad; ÷ floor: over as many evaluations as points"
    tables.show(_TITLES, _rows(programs, seconds), title, caption)


def _programs(config: configs.Benchmark) -> list[Program]:
    loss_fn, params, kwargs = _problem(config)

    def gradient(params: Any, kwargs: Any) -> Any:
        return jax.value_and_grad(loss_fn, has_aux=True)(params, **kwargs)

    def gradient_through(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
        def step(params: Any, state: Any, kwargs: Any) -> Any:
            (loss, aux), grads = gradient(params, kwargs)
            updates, state = tx.update(grads, state, params, **kwargs)
            return loss, aux, updates, state

        return step

    evaluation, seconds = _compiled(gradient, params, kwargs)
    programs = [
        Program(f"{calls} × value_and_grad", evaluation, (params, kwargs), calls, calls, seconds) for calls in (1, 2, 3)
    ]
    members = {
        "sam": (crsam_jax.sam(loss_fn, has_aux=True), 2),
        **{f"crsam, {how}": (crsam_jax.crsam(loss_fn, evaluation=how, has_aux=True), 3) for how in _EVALUATIONS},
    }
    if config.conditional:
        member = crsam_jax.crsam(loss_fn, evaluation="sequential", has_aux=True)
        members["crsam in lax.cond"] = (crsam_jax.periodic(member, k=1), 3)
    for name, (tx, floor) in track(members.items(), "compiling", "programs"):
        state = tx.init(params)
        compiled, seconds = _compiled(gradient_through(tx), params, state, kwargs)
        programs.append(Program(name, compiled, (params, state, kwargs), 1, floor, seconds))
    for program in programs:
        program.run()  # warm up
    return programs


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - start


def _problem(config: configs.Benchmark) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """Loss, params, and the loss's arguments: one batch of random images and labels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(config.batch_size, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, config.batch_size), jnp.int32)
    if config.model == "convnet":
        model: nnx.Module = ConvNet(3, 10, config.width, rngs=nnx.Rngs(0))
    else:
        model = models.build(config.model, 10, (32, 32, 3), nnx.Rngs(0))
    graphdef, params, model_state = (
        nnx.graphdef(model),
        nnx.state(model, nnx.Param),
        nnx.state(model, nnx.Not(nnx.Param)),
    )

    def loss_fn(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, params, model_state, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return jnp.mean(losses), nnx.state(model, nnx.Not(nnx.Param))

    return loss_fn, params, {"model_state": model_state, "images": images, "labels": labels}


def _rows(programs: list[Program], seconds: dict[str, list[float]]) -> list[list[str]]:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for program in programs:
        low, _, high = statistics.quantiles(seconds[program.name], n=4)
        floor = median[f"{program.floor} × value_and_grad"]
        memory = program.compiled.memory_analysis()
        cells = [
            program.name,
            f"{1e3 * median[program.name]:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{median[program.name] / median['1 × value_and_grad']:.2f}",
            f"{median[program.name] / floor:.2f}",
            f"{memory.temp_size_in_bytes / 1e6:.1f}",
            f"{program.compile_seconds:.1f}",
        ]
        rows.append(cells)
    return rows
