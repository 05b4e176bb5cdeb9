"""Settings that must stand before jax starts, and what many tests share."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # as a mesh for the tests of sharding; the others use the first one


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield
