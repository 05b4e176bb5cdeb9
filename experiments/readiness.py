"""What a full-size run takes, without running it: parameters, FLOPs and memory of a step, hours.

The gradient and the base optimizer's step are lowered and XLA counts their FLOPs before any optimization. A method of
k gradient evaluations is counted as the base step and k − 1 more gradients; its arithmetic over the parameters, some
passes over memory, is not. Memory is that of the step compiled for this machine's backend: temporaries on a CPU are
not those on a GPU or TPU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import recipes, scale, tables
from experiments.configs import Readiness, Run
from experiments.data import imagenet
from experiments.inputs import Signature
from experiments.optimizers import method_of
from experiments.program import Program, make_program
from experiments.progress import track
from experiments.recipes import Recipe, Sam

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
    """Of a step."""
    steps: int
    """Of the whole run."""
    state_bytes: int
    """Parameters, optimizer and model state: what every device holds between steps."""
    temporary_bytes: int | None
    """Of the compiled step, on this backend; None if it was not compiled."""

    def hours(self, teraflops: float) -> float:
        """Of the whole run at a sustained rate of 10¹² FLOP/s each."""
        return self.flops * self.steps / (teraflops * 1e12) / 3600


def readiness(names: Sequence[str], config: Readiness) -> list[Estimate]:
    """Estimates recipes × methods, prints the table and writes it to ``config.out``.

    Raises:
      ValueError: for an unknown name.
    """
    chosen = {name: recipes.get(name) for name in names or recipes.PAPER}
    memory: dict[str, int] | None = {} if config.compile else None
    rows: list[Estimate] = []
    table: list[list[str]] = []
    for name, recipe in track(chosen.items(), "compiling" if config.compile else "lowering", "recipes"):
        rows += estimates(name, recipe, memory)
        table = [cells(row, config.teraflops) for row in rows]
        if config.out is not None:  # as far as it is known: compiling all of them takes its time
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(tables.markdown(titles(config.teraflops), table))
    tables.show(titles(config.teraflops), table, keys=2)
    return rows


def estimates(
    name: str, recipe: Recipe, memory: dict[str, int] | None = None, methods: Sequence[str] = METHODS
) -> list[Estimate]:
    """The rows of one recipe, a method each; nothing is allocated.

    Args:
      name: of the recipe.
      recipe: the recipe.
      memory: temporary bytes of the steps compiled so far, to which its own are added: recipes that differ in their
        numbers or in the classes of their data share a program but for the last layer. None compiles nothing.
      methods: names of methods.
    """
    signature = abstract_signature(recipe)
    batch = abstract_batch(recipe, signature)
    base = _program(recipe, signature, "base")
    state = jax.eval_shape(base.init, 0)
    step = _flops(base.step.lower(state, batch))
    gradient = _gradient_flops(base, state, batch)
    rows = []
    for method in methods:
        program = _program(recipe, signature, method)
        state = jax.eval_shape(program.init, 0)
        evaluations = method_of(dataclasses.replace(recipe, method=method)).evaluations
        temporaries = None
        if memory is not None:
            key = _network(recipe, signature, method)
            if key not in memory:
                memory[key] = _temporaries(program, state, batch)
            temporaries = memory[key]
        rows.append(
            Estimate(
                name,
                method,
                _size(state.params),
                step + (evaluations - 1) * gradient,
                recipe.epochs * signature.steps_per_epoch,
                sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
                temporaries,
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


def titles(teraflops: float) -> list[str]:
    """Of the columns of the table."""
    return [
        "recipe", "method", "parameters M", "GFLOP a step", "steps", "state MB",
        f"temporaries MB ({jax.default_backend()})", f"hours at {teraflops:g} TFLOP/s",
    ]  # fmt: skip


def cells(row: Estimate, teraflops: float) -> list[str]:
    """An estimate's line of the table."""
    return [
        row.recipe,
        row.method,
        f"{row.parameters / 1e6:.2f}",
        f"{row.flops / 1e9:,.0f}",
        f"{row.steps:,}",
        f"{row.state_bytes / 1e6:,.0f}",
        "–" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:,.0f}",
        f"{row.hours(teraflops):.1f}",
    ]


def _program(recipe: Recipe, signature: Signature, method: str) -> Program:
    return make_program(dataclasses.replace(recipe, method=method), signature, scale.start(Run(devices=1)))


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


def _temporaries(program: Program, state: Any, batch: Any) -> int:
    # Memory is planned before machine code is made; the code is never run, so making it is not to take long.
    compiled = program.step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
