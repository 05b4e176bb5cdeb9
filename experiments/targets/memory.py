"""Memory of a device that a step takes."""

import re
from typing import Any, NamedTuple

import jax

from experiments.targets.devices import Target

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device while a step runs, and whether it has them.

    Attributes:
      used: arguments, results and temporaries together.
      temporaries: what lives within the step alone; None where the compiler refused it and says the sum only.
      fits: whether the device has so much.
    """

    used: int
    temporaries: int | None
    fits: bool


def memory_of(target: Target, lowered: Any) -> Memory:
    """Compiles a lowered step for a target and reads its memory."""
    try:
        plan = target.compile(lowered).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return Memory(_asked_for(error), None, fits=False)
    used = _total(plan)
    return Memory(used, plan.temp_size_in_bytes, fits=target.memory is None or used <= target.memory)


def _total(plan: Any) -> int:
    return int(  # results that take a donated argument's place count once
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.generated_code_size_in_bytes
    )


def _asked_for(error: jax.errors.JaxRuntimeError) -> int:
    """Bytes in the message of a compiler that refuses a program for its memory, the first figure in it.

    Raises:
      JaxRuntimeError: the error itself, if it is another one.
    """
    figure = re.search(r"(\d+(?:\.\d+)?)([KMGT])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or figure is None:
        raise error
    return round(float(figure[1]) * _UNITS[figure[2]])
