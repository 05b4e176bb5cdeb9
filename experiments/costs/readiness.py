"""What a full-size run takes, without running it: parameters, FLOPs and memory of a step, hours.

The gradient and the base optimizer's step are lowered and XLA counts their FLOPs before any optimization. A method of
k gradient evaluations is counted as the base step and k − 1 more gradients; its arithmetic over the parameters, some
passes over memory, is not. Memory is for the step compiled for this machine's backend, or for a target: temporaries
on a CPU are not those on a GPU or TPU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from experiments.costs.targets import Memory, Target, find, memory_of
from experiments.data.inputs import Signature, signature_of
from experiments.settings import ranges, recipes
from experiments.settings.configs import Readiness, Run
from experiments.settings.recipes import Recipe
from experiments.system import tables
from experiments.system.progress import track
from experiments.training import devices
from experiments.training.optimizers import method_of
from experiments.training.program import make_program

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


def readiness(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    config: Readiness = Readiness(),  # noqa: B008
) -> list[Estimate]:
    """Print parameters, FLOPs and memory of a step, and hours on a device, without training.

    Args:
      names: Recipes; the rows of the paper by default.
      config: The device.
    """
    ranges.check(config)
    if config.target is None and config.devices is not None:
        raise ValueError("--devices is for a --target.")
    if config.target is not None and not config.compile:
        raise ValueError(f"--target {config.target} is what to compile for: add --compile.")
    target = None if config.target is None else find(config.target, config.devices)
    chosen = {name: recipes.get(name) for name in names or recipes.PAPER}
    memory: dict[Any, Memory] | None = {} if config.compile else None
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
    memory: dict[Any, Memory] | None = None,
    methods: Sequence[str] = METHODS,
    target: Target | None = None,
) -> list[Estimate]:
    """The rows of one recipe, one per method, compiled for a target or this machine's backend; nothing is allocated.

    ``memory`` has the steps compiled so far, and gets this one's too: recipes that differ in their numbers
    or in the classes of their data share a program except for the last layer. None compiles nothing.
    """
    signature = _signature(recipe)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *signature.image_shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)
    base = make_program(dataclasses.replace(recipe, method="base"), signature, _here().mesh)
    state = jax.eval_shape(base.init, 0)
    base_flops = _flops(base.step, state, (images, labels))
    gradient = jax.jit(jax.value_and_grad(base.loss_fn, has_aux=True))
    gradient_flops = _flops(gradient, state.params, state.model_state, images.update(dtype=jnp.float32), labels)
    target = target or _here()
    rows = []
    for method in methods:
        of_method = dataclasses.replace(recipe, method=method)
        program = make_program(of_method, signature, target.mesh)
        state = jax.eval_shape(program.init, 0)
        # Memory does not depend on the number of epochs, and on the data's classes only in the last layer.
        key = dataclasses.replace(of_method.structure(), dataset="", epochs=1), signature.image_shape
        if memory is not None and key not in memory:
            step = program.step.lower(target.placed(state), target.placed((images, labels), "data"))
            memory[key] = memory_of(target, step)
        row = Estimate(
            recipe=name,
            method=method,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            flops=base_flops + (method_of(of_method).evaluations - 1) * gradient_flops,
            steps=recipe.epochs * signature.steps_per_epoch,
            state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            memory=None if memory is None else memory[key],
        )
        rows.append(row)
    return rows


def _flops(function: Any, *args: Any) -> float:
    return float(function.lower(*args).cost_analysis()["flops"])


def _signature(recipe: Recipe) -> Signature:
    """Of a recipe's data, without the data."""
    if recipe.dataset == "imagenet2012":
        return signature_of(recipe)
    shape, classes, examples = _SIZES[recipe.dataset]
    if recipe.examples_per_class is not None:
        examples = recipe.examples_per_class * classes
    channels = shape[-1]
    return Signature(shape, classes, (0.5,) * channels, (0.25,) * channels, examples // recipe.batch_size)


def _here() -> Target:
    """One device of this machine's backend, without a limit of memory."""
    # Memory is planned before machine code is made; the code is never run, so making it is not to take long.
    quickly = {"xla_backend_optimization_level": 0}
    return Target(jax.default_backend(), devices.start(Run(devices=1)), quickly, None)


def table(rows: Sequence[Estimate], teraflops: float, target: Target | None = None) -> str:
    """The estimates as Markdown."""
    place = jax.default_backend() if target is None else f"{target.name}, {target.mesh.size} device(s)"
    cells = []
    for row in rows:
        memory = row.memory
        limit = {}
        if target is not None and memory is not None:
            limit = {"memory of a device MB": _megabytes(memory.used), "fits": "yes" if memory.fits else "no"}
        line = {
            "recipe": row.recipe,
            "method": row.method,
            "parameters M": f"{row.parameters / 1e6:.2f}",
            "GFLOP a step": f"{row.flops / 1e9:,.0f}",
            "steps": f"{row.steps:,}",
            "state MB": _megabytes(row.state_bytes),
            f"temporaries MB ({place})": _megabytes(row.temporary_bytes),
            **limit,
            f"hours at {teraflops:g} TFLOP/s": f"{row.hours(teraflops):.1f}",
        }
        cells.append(line)
    return tables.markdown(list(cells[0]), [list(line.values()) for line in cells])


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f}"
