"""A small language model: pretraining at equal cost, then rounding to four bits and fine-tuning; see docs/language.md.

The text is Python's own documentation, ``pydoc_data.topics``, character by character; the other text, for fine-tuning,
is the source of modules of the standard library. Cost is counted in gradient evaluations, which are equal on every
machine; the seconds are noted too.
"""

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import crsam_jax as cj
from experiments.costs import problems
from experiments.studies.summary import paired
from experiments.system import files, tables
from experiments.system.tables import mean_and_deviation
from experiments.training import run_folder

_CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
_OTHER_MODULES = (
    "argparse",
    "asyncio.base_events",
    "datetime",
    "decimal",
    "difflib",
    "inspect",
    "subprocess",
    "typing",
)
_SEARCH_SEED = 1000


class Setting(NamedTuple):
    """What all arms share."""

    evaluations: int = 1000
    """Gradient evaluations of a pretraining."""
    batch_size: int = 8
    length: int = 128
    """Characters that the network sees."""
    width: int = 128
    depth: int = 5
    learning_rate: float = 2e-3
    fine_tuning_steps: int = 200
    search_part: int = 4
    """A trial of the search has the evaluations of a run divided by this."""


class Arm(NamedTuple):
    """A way of pretraining: the stage before AdamW, and what a step costs."""

    make: Callable[[Any, float, int], optax.GradientTransformation]
    """From the loss as network and criterion, ρ, and the number of steps."""
    evaluations: float
    radii: tuple[float, ...] = (0.0,)


def _late_sam(loss: Any, rho: float, steps: int) -> optax.GradientTransformation:
    return cj.late(cj.sam(loss.whole, rho), 0.9, steps)


def _functional_sam(loss: Any, rho: float, steps: int) -> optax.GradientTransformation:
    return cj.functional_sam(loss.network, loss.criterion, rho)


def _preconditioned(loss: Any, rho: float, steps: int) -> optax.GradientTransformation:
    return cj.functional_sam(loss.network, loss.criterion, rho, ascent=cj.ascents.preconditioned_ascent())


ARMS: dict[str, Arm] = {
    "adamw": Arm(lambda loss, rho, steps: optax.identity(), 1.0),
    "sam-late": Arm(_late_sam, 1.1, (0.02, 0.1, 0.5)),
    "functional-sam": Arm(_functional_sam, 2.0, (0.02, 0.1, 0.5)),
    "functional-sam-preconditioned": Arm(_preconditioned, 2.0, (0.02, 0.1, 0.5)),
}
"""The first is what the others are compared with."""


class Result(NamedTuple):
    """A row of runs.csv: losses in nats per character on text that was not trained on."""

    arm: str
    seed: int
    rho: float
    steps: int
    loss: float
    rounded_loss: float
    """After rounding the matrices to four bits."""
    forgetting: float
    """How much the loss rises by fine-tuning on the other text."""
    fine_tuned_loss: float
    """On the other text."""
    seconds: float


class _Loss(NamedTuple):
    network: Callable[..., jax.Array]
    criterion: Callable[..., jax.Array]

    def whole(self, params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        return self.criterion(self.network(params, tokens), labels)


class _Text(NamedTuple):
    train: jax.Array
    held_out: jax.Array
    """Windows, (number, length + 1)."""


def language(
    seeds: int = 3,
    arms: Sequence[str] = tuple(ARMS),
    setting: Setting = Setting(),  # noqa: B008
    out: Path = Path("results/language"),
) -> list[Result]:
    """Pretrain a small language model by several methods at equal cost, or resume; write tables.

    ρ of each arm is searched first, by the loss on held-out text after a shorter run with a seed of its own.

    Args:
        seeds: Runs of each arm.
        arms: What is compared; adamw comes first.
        setting: What all arms share.
        out: Folder of the results; a run that is complete there is not repeated.

    Raises:
        FileExistsError: if the folder holds runs of another setting.
    """
    out.mkdir(parents=True, exist_ok=True)
    run_folder.keep_settings(setting._asdict(), out / "setting.json", "runs of another setting")
    text, other = documentation(setting.length), source_code(setting.length)
    done = {(row.arm, row.seed) for row in tables.read(out / "runs.csv", Result)}
    for arm in arms:
        rho = _searched(arm, setting, text, out)
        for seed in range(seeds):
            if (arm, seed) not in done:
                result = train(arm, seed, rho, setting, text, other)
                tables.append(out / "runs.csv", [result])
                print(f"{arm}, seed {seed}, rho {rho:g}: {result.loss:.3f} nats per character", flush=True)
    results = [row for row in tables.read(out / "runs.csv", Result) if row.arm in arms]
    table = summarize(results, arms)
    files.replace(out / "table.md", table)
    tables.show(table)
    return results


def documentation(length: int) -> _Text:
    """Topics of ``pydoc``; every fifth, by name, is held out, without the paragraphs that other topics share."""
    names = sorted(topics.topics)
    train = [topics.topics[name] for index, name in enumerate(names) if index % 5 != 4]
    seen = {tuple(paragraph.split()) for topic in train for paragraph in topic.split("\n\n")}
    held_out = [paragraph for name in names[4::5] for paragraph in topics.topics[name].split("\n\n")]
    new = [paragraph for paragraph in held_out if tuple(paragraph.split()) not in seen]
    return _Text(_tokens("\n".join(train)), _windows(_tokens("\n\n".join(new)), length))


def source_code(length: int) -> _Text:
    """Modules of the standard library; the last tenth is held out."""
    modules = [__import__(name, fromlist=["_"]) for name in _OTHER_MODULES]
    tokens = _tokens("\n".join(map(inspect.getsource, modules)))
    cut = len(tokens) * 9 // 10
    return _Text(tokens[:cut], _windows(tokens[cut:], length))


def train(arm: str, seed: int, rho: float, setting: Setting, text: _Text, other: _Text | None) -> Result:
    """One pretraining, and what becomes of it; without another text the last measures are NaN."""
    begun = time.monotonic()
    steps = round(setting.evaluations / ARMS[arm].evaluations)
    loss, params = _problem(setting, seed)
    stage = ARMS[arm].make(loss, rho, steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, setting.learning_rate, steps // 10, steps)
    tx = optax.chain(stage, optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    key = jax.random.key(seed)
    params = _fitted(loss, tx, params, text.train, key, steps, setting)
    judge = functools.partial(_held_out_loss, jax.jit(loss.whole))
    found = judge(params, text.held_out)
    after = fine_tuned = float("nan")
    if other is not None:
        tuned = optax.adamw(setting.learning_rate / 10, weight_decay=0.1)
        key = jax.random.fold_in(key, 1)
        moved = _fitted(loss, tuned, params, other.train, key, setting.fine_tuning_steps, setting)
        after, fine_tuned = judge(moved, text.held_out), judge(moved, other.held_out)
    return Result(
        arm,
        seed,
        rho,
        steps,
        found,
        judge(rounded(params), text.held_out),
        after - found,
        fine_tuned,
        time.monotonic() - begun,
    )


def rounded(params: Any, bits: int = 4) -> Any:
    """Matrices with each column's elements rounded to ``bits`` bits, between the column's largest and its negative.

    Example:
      >>> print(rounded({"kernel": jnp.array([[7.0], [-3.4], [0.4]])})["kernel"].ravel())
      [ 7. -3.  0.]
    """
    levels = 2 ** (bits - 1) - 1

    def leaf(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        scale = jnp.max(jnp.abs(x), axis=0) / levels
        return jnp.round(x / jnp.where(scale > 0, scale, 1)) * scale

    return jax.tree.map(leaf, params)


def summarize(results: Sequence[Result], arms: Sequence[str]) -> str:
    """Means with deviations, and paired differences from the first arm with intervals of 95 %, as Markdown."""
    titles = ("arm", "ρ", "loss", "− adamw", "4 bits", "− adamw", "forgetting", "− adamw", "steps", "seeds")
    by_arm = {arm: [row for row in results if row.arm == arm] for arm in arms}
    lines = []
    for arm, rows in by_arm.items():
        line = [arm, f"{rows[0].rho:g}"]
        for measure in ("loss", "rounded_loss", "forgetting"):
            own, base = (_by_seed(by_arm[name], measure) for name in (arm, arms[0]))
            mean, deviation = mean_and_deviation(list(own.values()))
            difference = paired(own, base)
            line += [
                f"{mean:.3f} ± {deviation:.3f}",
                "–" if arm == arms[0] else f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
            ]
        lines.append([*line, f"{rows[0].steps}", f"{len(rows)}"])
    return tables.markdown(titles, lines)


def _by_seed(rows: Sequence[Result], measure: str) -> Mapping[int, float]:
    return {row.seed: getattr(row, measure) for row in rows}


def _searched(arm: str, setting: Setting, text: _Text, out: Path) -> float:
    """The radius with the lowest held-out loss after a short run."""
    if len(radii := ARMS[arm].radii) == 1:
        return radii[0]
    path, short = out / "search.csv", setting._replace(evaluations=setting.evaluations // setting.search_part)
    done = {(row.arm, row.rho) for row in tables.read(path, Result)}
    for rho in radii:
        if (arm, rho) not in done:
            tables.append(path, [train(arm, _SEARCH_SEED, rho, short, text, None)])
    return min((row for row in tables.read(path, Result) if row.arm == arm), key=lambda row: row.loss).rho


def _problem(setting: Setting, seed: int) -> tuple[_Loss, Any]:
    def make() -> nnx.Module:
        vocabulary = len(_CHARACTERS) + 1
        return problems.Language(setting.length, vocabulary, setting.width, setting.depth, 4, nnx.Rngs(seed))

    graphdef = nnx.graphdef(nnx.eval_shape(make))

    def network(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, copy=True)(tokens)

    def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    return _Loss(network, criterion), nnx.state(make(), nnx.Param)


def _fitted(
    loss: _Loss,
    tx: optax.GradientTransformation,
    params: Any,
    text: jax.Array,
    key: jax.Array,
    steps: int,
    setting: Setting,
) -> Any:
    update = optax.with_extra_args_support(tx).update
    offsets = jnp.arange(setting.length + 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        starts = jax.random.randint(key, (setting.batch_size, 1), 0, len(text) - setting.length)
        windows = text[starts + offsets]
        batch = {"tokens": windows[:, :-1], "labels": windows[:, 1:]}
        value, grads = jax.value_and_grad(loss.whole)(params, **batch)
        updates, state = update(grads, state, params, loss=value, **batch)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)
    for number in range(steps):
        params, state = step(params, state, jax.random.fold_in(key, number))
    return params


def _held_out_loss(loss: Callable[..., jax.Array], params: Any, windows: jax.Array, part: int = 64) -> float:
    batches = [windows[start : start + part] for start in range(0, len(windows), part)]
    sums = [float(loss(params, batch[:, :-1], batch[:, 1:])) * len(batch) for batch in batches]
    return sum(sums) / len(windows)


def _tokens(text: str) -> jax.Array:
    """A number for each character; those that Python's documentation hardly has share one."""
    numbers = {character: index for index, character in enumerate(_CHARACTERS)}
    return jnp.asarray(np.array([numbers.get(character, len(numbers)) for character in text], np.int32))


def _windows(tokens: jax.Array, length: int) -> jax.Array:
    count = len(tokens) // (length + 1)
    return tokens[: count * (length + 1)].reshape(count, length + 1)
