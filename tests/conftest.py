"""Settings that must stand before jax starts, and what many tests share."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # as a mesh for the tests of sharding; the others use the first one

# The first example of a property compiles, so a deadline would only measure the machine. CI repeats itself.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh():
    """Eight CPU devices along one axis, "data"."""
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("jax started with fewer than 8 CPU devices, before tests/conftest.py could ask for them")
    return jax.make_mesh((8,), ("data",), devices=devices[:8], axis_types=(jax.sharding.AxisType.Auto,))
