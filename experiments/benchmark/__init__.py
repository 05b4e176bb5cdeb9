"""What a step costs: time on the device at hand, or kernels and cycles as the compiler of another device plans them."""

import jax

from experiments import configs, ranges, tables
from experiments.benchmark import here, there


def benchmark(config: configs.Benchmark) -> None:
    """Measures all programs and prints a table; with ``config.out``, writes it as CSV too.

    Raises:
      ImportError: if the compiler for ``config.target`` is not installed.
      ValueError: if there is no such network or target, or not as many devices.
    """
    ranges.check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # or there would be no compilation to time
    place = here if config.target is None else there
    rows = place.measured(config)
    tables.show(place.table(rows))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        tables.write(config.out, rows)
