"""Everything that is worth timing on a device, in one run that can be interrupted at any moment.

A row is in the CSV file as soon as its program was timed, and is not timed again by the same command. The programs that
matter most come first, for all networks. A program and SGD on the same network are timed in turn, so their ratio is one
of the same moments.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import crsam_jax as cj
from experiments.costs import problems, steps
from experiments.costs.problems import Problem
from experiments.settings import configs
from experiments.system import files, tables

NETWORKS: dict[str, Callable[[], Problem]] = {
    "resnet18": lambda: problems.images("resnet18", 128, 32),
    "vit_s32": lambda: problems.images("vit_s32", 256, 224, "bfloat16"),
    "dense": problems.dense,
    "language": problems.language,
}

PROGRAMS = (
    "SGD",
    "sam",
    "crsam, ordered",
    "optax.contrib.sam",
    "msam",
    "crsam, vmap",
    "crsam, sequential",
    "s2sam",
    "sam, ascent on a quarter",
    "crsam, auto",
)
"""The most important first."""

_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
_SHORTEST = 0.02  # seconds in which the calls of a round are counted


class Row(NamedTuple):
    """A program's step: times over all rounds."""

    device: str
    network: str
    batch_size: int
    dtype: str
    program: str
    points: float
    """Gradient evaluations that it cannot do without; a quarter of a batch is a quarter."""
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    sgd_ms: float
    """SGD's median over the same rounds."""
    over_sgd: float
    over_floor: float
    """Over as many steps of SGD as points."""
    temporary_bytes: int
    compile_seconds: float


class _Program(NamedTuple):
    step: Callable[..., Any]
    state: list[Any]
    """Params, model state, optimizer state; replaced by each call."""
    batch: Any
    temporary_bytes: int
    compile_seconds: float

    def run(self, calls: int) -> float:
        """The seconds of a step, over some calls."""
        start = time.perf_counter()
        for _ in range(calls):
            self.state[:] = self.step(*self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / calls


def run(config: configs.Benchmark) -> list[Row]:
    """Times the programs missing in the file, within the budget, and returns the file's rows of this device."""
    path, started = config.out or Path("results/benchmark.csv"), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else "cpu"
    done = {(row.network, row.program) for row in tables.read(path, Row) if row.device == kind}
    open_: dict[str, tuple[Problem, _Program]] = {}
    longest: dict[str, float] = {}  # seconds that a program of each network took
    for program, network in itertools.product(PROGRAMS, NETWORKS):
        left = config.budget - (time.monotonic() - started)
        if (network, program) in done:
            continue
        if left < longest.get(network, 0.0):
            print(f"{network}, {program}: left out, {left:.0f} s are left")
            continue
        begun = time.monotonic()
        if network not in open_:
            problem = NETWORKS[network]()
            open_[network] = problem, _compiled(problem, "SGD")
        row = _timed(kind, network, program, *open_[network], config.rounds)
        longest[network] = max(longest.get(network, 0.0), time.monotonic() - begun)
        tables.append(path, [row])
        rows = [row for row in tables.read(path, Row) if row.device == kind]
        if config.page is not None:
            write_page(config.page, table(rows))
        print(f"{network}, {program}: {row.median_ms:.2f} ms, {row.over_sgd:.2f} × SGD", flush=True)
    return [row for row in tables.read(path, Row) if row.device == kind]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, network by network."""
    parts = []
    for network in dict.fromkeys(row.network for row in rows):
        own = sorted((row for row in rows if row.network == network), key=lambda row: PROGRAMS.index(row.program))
        first = own[0]
        lines = [
            [
                row.program,
                f"{row.median_ms:.2f}",
                f"{row.lower_quartile_ms:.2f} to {row.upper_quartile_ms:.2f}",
                f"{row.over_sgd:.2f}",
                f"{row.over_floor:.2f}",
                f"{row.temporary_bytes / 1e6:,.0f}",
                f"{row.compile_seconds:.1f}",
            ]
            for row in own
        ]
        titles = ("program", "median ms", "quartiles ms", "÷ SGD", "÷ floor", "temporaries MB", "compile s")
        title = f"{network}, batch {first.batch_size}, {first.dtype}, on {first.device}"
        parts.append(f"{title}\n\n{tables.markdown(titles, lines)}")
    return "\n".join(parts)


def write_page(page: Path, text: str) -> None:
    """Puts a table into a page, between its marks.

    Raises:
      ValueError: if the page has no marks.
    """
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{page} has no place for the table: {_BEGIN} and {_END}, each on a line of its own.")
    files.replace(page, f"{before}{_BEGIN}\n\n{text}\n{_END}{after}")


def _timed(kind: str, network: str, name: str, problem: Problem, sgd: _Program, rounds: int) -> Row:
    programs = [sgd] if name == "SGD" else [sgd, _compiled(problem, name)]
    for one in programs:
        one.run(1)  # warm up
    calls = [max(1, round(_SHORTEST / one.run(1))) for one in programs]
    seconds = [[one.run(count) for one, count in zip(programs, calls, strict=True)] for _ in range(rounds)]
    quartiles = (1e3 * np.quantile(seconds, (0.25, 0.5, 0.75), axis=0)).T.tolist()
    base, (low, median, high), points = quartiles[0][1], quartiles[-1], _points(name)
    return Row(
        kind,
        network,
        problem.examples,
        problem.dtype,
        name,
        points,
        median,
        low,
        high,
        base,
        median / base,
        median / base / points,
        programs[-1].temporary_bytes,
        programs[-1].compile_seconds,
    )


def _points(name: str) -> float:
    if name.endswith("quarter"):
        return 1.25
    return {"SGD": 1, "msam": 1, "s2sam": 1, "sam": 2, "optax.contrib.sam": 2}.get(name, 3)


def _compiled(problem: Problem, name: str) -> _Program:
    """A whole training step, compiled; its state is donated."""
    loss_fn, base = problem.loss_fn, optax.sgd(0.01, momentum=0.9)
    part = 4 if name.endswith("quarter") else 1
    tx = optax.with_extra_args_support(_optimizer(loss_fn, base, name))

    def train(params: Any, model_state: Any, opt_state: Any, batch: Any) -> Any:
        inputs = {"model_state": model_state, **batch}
        ascended = inputs | {key: value[::part] for key, value in batch.items()}
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, **ascended)
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, **inputs)
        return optax.apply_updates(params, updates), model_state, opt_state

    params, model_state = jax.jit(problem.initial)()
    batch = jax.jit(problem.batch)()
    state = [params, model_state, jax.jit(tx.init)(params)]
    start = time.perf_counter()
    compiled: Any = jax.jit(train, donate_argnums=(0, 1, 2)).lower(*state, batch).compile()
    seconds = time.perf_counter() - start
    return _Program(compiled, state, batch, compiled.memory_analysis().temp_size_in_bytes, seconds)


def _optimizer(loss_fn: steps.LossFn, base: optax.GradientTransformation, name: str) -> Any:
    if name == "SGD":
        return base
    if name == "msam":
        return cj.msam(base, 0.3, 0.9)
    if name == "s2sam":
        return cj.s2sam(base, 0.05)
    if name == "sam, ascent on a quarter":
        return optax.chain(cj.sam(loss_fn, has_aux=True, ascent_only=True), base)
    found = {method.name: method.tx for method in steps.methods(loss_fn, base)}
    return found[name]
