"""Settings that must stand before jax starts, and what many tests share."""

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)  # as a mesh for the tests of sharding; the others use the first one

settings.register_profile("no deadline", deadline=None)  # how long a compilation takes is no property
settings.load_profile("no deadline")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield
