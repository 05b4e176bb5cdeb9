"""What a step costs: time on the device at hand, or kernels and cycles as the compiler of another device plans them."""

from collections.abc import Sequence
from typing import Any

import jax

from experiments import configs, ranges, tables
from experiments.benchmark import here, there


def benchmark(config: configs.Benchmark = configs.Benchmark()) -> None:  # noqa: B008
    """Time one step of each method against plain gradient evaluations, with peak temporary memory.

    Args:
      config: What to time.

    Raises:
      ImportError: if the compiler for ``config.target`` is not installed.
      ValueError: if there is no such network or target, or not as many devices.
    """
    ranges.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # or there would be no compilation to time
    rows: Sequence[Any]
    if config.target is None:
        rows = here.timings(config)
        tables.show(here.table(rows))
    else:
        rows = there.costs(config)
        tables.show(there.table(rows))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        tables.write(config.out, rows)
