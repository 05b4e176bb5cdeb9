"""What a full-size run takes, without running it: parameters, FLOPs and memory of a step, hours.

The gradient and the base optimizer's step are lowered and XLA counts their FLOPs before any optimization. A method of
k gradient evaluations is counted as the base step and k − 1 more gradients; its arithmetic over the parameters, some
passes over memory, is not. Memory is that of the step compiled for this machine's backend, or for a target: temporaries
on a CPU are not those on a GPU or TPU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import ranges, recipes, scale, tables
from experiments.configs import Readiness, Run
from experiments.data import imagenet
from experiments.inputs import Signature
from experiments.optimizers import method_of
from experiments.program import Program, make_program
from experiments.progress import track
from experiments.recipes import Recipe, Sam
from experiments.targets import Memory, Target, find, memory_of

METHODS = ("base", "sam", "crsam")

# Shape of an image, classes, training examples.
_SIZES: dict[str, tuple[tuple[int, int, int], int, int]] = {
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "fashion_mnist": ((28, 28, 1), 10, 60_000),
    "digits": ((8, 8, 1), 10, 1_000),
}


class Estimate(NamedTuple):
    """One row: a recipe and a method."""

    recipe: str
    method: str
    parameters: int
    flops: float
    """Floating-point operations of a step."""
    steps: int
    """Steps of the whole run."""
    state_bytes: int
    """Parameters, optimizer and model state: what every device holds between steps."""
    memory: Memory | None
    """Memory of a device while the compiled step runs; None if it was not compiled."""

    @property
    def temporary_bytes(self) -> int | None:
        """Temporaries of the compiled step; None if it was not compiled, or its compiler refused it."""
        return None if self.memory is None else self.memory.temporaries

    def hours(self, teraflops: float) -> float:
        """Hours of the whole run at a sustained rate of so many 10¹² FLOP/s."""
        return self.flops * self.steps / (teraflops * 1e12) / 3600


def readiness(names: Sequence[str], config: Readiness) -> list[Estimate]:
    """Estimates recipes × methods, prints the table and writes it to ``config.out``.

    Raises:
      ImportError: if the compiler for ``config.target`` is not installed.
      ValueError: for an unknown name or target.
    """
    ranges.check(config)
    if config.target is None and config.devices is not None:
        raise ValueError("--devices is for a --target.")
    if config.target is not None and not config.compile:
        raise ValueError(f"--target {config.target} is what to compile for: add --compile.")
    target = None if config.target is None else find(config.target, config.devices)
    chosen = {name: recipes.get(name) for name in names or recipes.PAPER}
    memory: dict[str, Memory] | None = {} if config.compile else None
    rows: list[Estimate] = []
    for name, recipe in track(chosen.items(), "compiling" if config.compile else "lowering", "recipes"):
        rows += estimates(name, recipe, memory, target=target)
        if config.out is not None:  # as far as it is known: compiling all of them takes its time
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(table(rows, config.teraflops, target))
    tables.show(table(rows, config.teraflops, target), keys=2)
    return rows


def estimates(
    name: str,
    recipe: Recipe,
    memory: dict[str, Memory] | None = None,
    methods: Sequence[str] = METHODS,
    target: Target | None = None,
) -> list[Estimate]:
    """The rows of one recipe, a method each; nothing is allocated.

    Args:
      name: of the recipe.
      recipe: the recipe.
      memory: of the steps compiled so far, to which its own are added: recipes that differ in their numbers or in the
        classes of their data share a program but for the last layer. None compiles nothing.
      methods: names of methods.
      target: what to compile for; None is the backend at hand.
    """
    signature = abstract_signature(recipe)
    batch = abstract_batch(recipe, signature)
    target = target or _here()
    base = _program(recipe, signature, "base", _here())
    state = jax.eval_shape(base.init, 0)
    base_flops = _flops(base.step.lower(state, batch))
    gradient = _gradient_flops(base, state, batch)
    rows = []
    for method in methods:
        program = _program(recipe, signature, method, target)
        state = jax.eval_shape(program.init, 0)
        evaluations = method_of(dataclasses.replace(recipe, method=method)).evaluations
        key = _network(recipe, signature, method)
        if memory is not None and key not in memory:
            step = program.step.lower(target.placed(state), target.placed(batch, "data"))
            memory[key] = memory_of(target, step)
        rows.append(
            Estimate(
                name,
                method,
                _size(state.params),
                base_flops + (evaluations - 1) * gradient,
                recipe.epochs * signature.steps_per_epoch,
                sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                None if memory is None else memory[key],
            )
        )
    return rows


def abstract_signature(recipe: Recipe) -> Signature:
    """Shapes of a recipe's data, without the data."""
    if recipe.dataset == "imagenet2012":
        shape, classes, examples = (
            (recipe.image_size, recipe.image_size, 3),
            imagenet.NUM_CLASSES,
            imagenet.TRAINING_EXAMPLES,
        )
    else:
        shape, classes, examples = _SIZES[recipe.dataset]
    if recipe.examples_per_class is not None:
        examples = recipe.examples_per_class * classes
    channels = shape[-1]
    return Signature(shape, classes, (0.5,) * channels, (0.25,) * channels, examples // recipe.batch_size)


def abstract_batch(recipe: Recipe, signature: Signature) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a batch."""
    images = jax.ShapeDtypeStruct((recipe.batch_size, *signature.image_shape), jnp.uint8)
    return images, jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)


def table(rows: Sequence[Estimate], teraflops: float, target: Target | None = None) -> str:
    """The estimates as Markdown."""
    place = jax.default_backend() if target is None else f"{target.name}, {target.mesh.size} device(s)"
    titles = (
        "recipe", "method", "parameters M", "GFLOP a step", "steps", "state MB", f"temporaries MB ({place})",
        *(() if target is None else ("memory of a device MB", "fits")), f"hours at {teraflops:g} TFLOP/s",
    )  # fmt: skip
    return tables.markdown(titles, [_cells(row, teraflops, target) for row in rows])


def _cells(row: Estimate, teraflops: float, target: Target | None) -> list[str]:
    cells = [
        row.recipe,
        row.method,
        f"{row.parameters / 1e6:.2f}",
        f"{row.flops / 1e9:,.0f}",
        f"{row.steps:,}",
        f"{row.state_bytes / 1e6:,.0f}",
        "–" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:,.0f}",
    ]
    if target is not None and row.memory is not None:
        cells += [f"{row.memory.used / 1e6:,.0f}", "yes" if row.memory.fits else "no"]
    return [*cells, f"{row.hours(teraflops):.1f}"]


def _here() -> Target:
    """One device of the backend at hand, not limited in its memory."""
    # Memory is planned before machine code is made; the code is never run, so making it is not to take long.
    quickly = {"xla_backend_optimization_level": 0}
    return Target(jax.default_backend(), scale.start(Run(devices=1)), quickly, None)


def _program(recipe: Recipe, signature: Signature, method: str, target: Target) -> Program:
    return make_program(dataclasses.replace(recipe, method=method), signature, target.mesh)


def _network(recipe: Recipe, signature: Signature, method: str) -> str:
    """What the compiled step depends on, but for the number of classes."""
    same = dataclasses.replace(
        recipe, method=method, dataset="cifar10", epochs=1, learning_rate=0.0, weight_decay=0.0, sam=Sam(),
        crsam=dataclasses.replace(recipe.crsam, rho=0.0, alpha=0.0, beta=0.0),
    )  # fmt: skip
    return repr((same, signature.image_shape))


def _gradient_flops(program: Program, state: Any, batch: Any) -> float:
    images, labels = batch
    images = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    gradient = jax.jit(jax.value_and_grad(program.loss_fn, has_aux=True))
    return _flops(gradient.lower(state.params, state.model_state, images, labels))


def _flops(lowered: Any) -> float:
    return float(lowered.cost_analysis()["flops"])


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
