"""How much code and how many instructions one step is: counts, no times. ``python -m experiments.costs.size``.

The step trains an MLP of 12 layers (24 arrays), SGD with momentum behind each method. Files and functions are the
library's own that one ``update`` enters; equations are counted in the whole step's jaxpr, nested ones too; instructions
are those that compute in the program compiled for CPU.
"""

import collections
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import crsam_jax
from experiments.costs.steps import optax_sam
from experiments.costs.targets import entry

LAYERS, FEATURES = 12, 32
BASE = optax.sgd(0.1, momentum=0.9)
_COMPUTES = re.compile(r" (fusion|custom-call|dot|reduce|copy|call|concatenate|transpose|broadcast|conditional)\(")


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
    """The mean squared error of the MLP, and no aux."""
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - y) ** 2), None


SEQUENTIAL = crsam_jax.Execution(strategy="sequential")
PROGRAMS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD": lambda: BASE,
    "optax.contrib.sam": lambda: optax_sam(loss_fn, BASE),
    "sam": lambda: optax.chain(crsam_jax.sam(loss_fn, has_aux=True), BASE),
    "crsam": lambda: optax.chain(crsam_jax.crsam(loss_fn, has_aux=True), BASE),
    "crsam, sequential": lambda: optax.chain(crsam_jax.crsam(loss_fn, has_aux=True, execution=SEQUENTIAL), BASE),
}


def size(make: Callable[[], optax.GradientTransformation]) -> dict[str, int]:
    """Files and functions entered, equations, and instructions of one training step."""
    layer = {"kernel": jnp.ones((FEATURES, FEATURES)) / FEATURES, "bias": jnp.zeros(FEATURES)}
    params, (x, y) = [layer] * LAYERS, jnp.ones((2, 16, FEATURES))
    tx = optax.with_extra_args_support(make())
    state = tx.init(params)

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, state = tx.update(grads, state, params, loss=loss, x=x, y=y)
        return optax.apply_updates(params, updates), state

    entered = _entered(lambda: jax.make_jaxpr(step)(params, state, x, y))
    equations = _equations(jax.make_jaxpr(step)(params, state, x, y).jaxpr)
    text = jax.jit(step).lower(params, state, x, y).compile().as_text() or ""
    return {
        "files": len({file for file, _ in entered}),
        "functions": len(entered),
        "equations": equations,
        "instructions": len(_COMPUTES.findall(entry(text))),
    }


def _entered(call: Callable[[], Any]) -> set[tuple[str, str]]:
    """The functions of the library that a call enters, by file and name."""
    root, found = str(Path(crsam_jax.__file__).parent), collections.Counter[tuple[str, str]]()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            found[frame.f_code.co_filename, frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return set(found)


def _equations(program: Any) -> int:
    total = len(program.eqns)
    for equation in program.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(item, "jaxpr", item)
                total += _equations(inner) if hasattr(inner, "eqns") else 0
    return total


def main() -> None:
    """Prints the table, in Markdown."""
    print("| program | files | functions | equations | instructions |\n|---|---|---|---|---|")
    for name, make in PROGRAMS.items():
        row = size(make)
        print(f"| {name} | {row['files']} | {row['functions']} | {row['equations']:,} | {row['instructions']} |")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
