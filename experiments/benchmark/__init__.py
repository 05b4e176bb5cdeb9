"""What a step costs: time on the device at hand, or kernels and cycles as the compiler of another device plans them."""

import jax

from experiments import configs


def benchmark(config: configs.Benchmark) -> None:
    """Measures all programs and prints a table; with ``config.out``, writes it as CSV too.

    Raises:
      ImportError: if the compiler for ``config.target`` is not installed.
      ValueError: if there is no such network or target, or not as many devices.
    """
    from experiments.benchmark import here, report, there

    jax.config.update("jax_enable_compilation_cache", False)  # or there would be no compilation to time
    if config.target is None:
        report.write(here.timings(config), here.table, config.out)
    else:
        report.write(there.costs(config), there.table, config.out)
