"""Settings that must stand before jax starts, and what many tests share."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Tests compile far more than they compute: without optimizing machine code they take half the time.
# On a busy machine eight devices on two cores may wait for each other for longer than XLA's 40 seconds.
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=300 "
os.environ["XLA_FLAGS"] = _FLAGS + os.environ.get("XLA_FLAGS", "")
jax.config.update("jax_num_cpu_devices", 8)  # as a mesh for the tests of sharding; the others use the first one

# The first example of a property compiles, so a deadline would only measure the machine. CI repeats itself.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")


# Every compiled program takes a few mappings of memory, of which Linux allows a process 65,530.
_MANY_MAPPINGS = 25_000


@pytest.fixture(scope="module", autouse=True)
def _forgotten_programs():
    """After a module lets go of the compiled programs if they are many: with too many the compiler ends the process."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """The folder of compiled programs, one for all of pytest-xdist's processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compiled(cache_folder):
    """The module's tests share compiled programs, where they compile the same network again and again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache_folder), 0.2), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield cache_folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def mesh():
    """Eight CPU devices along one axis, "data"."""
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("jax started with fewer than 8 CPU devices, before tests/conftest.py could ask for them")
    return jax.make_mesh((8,), ("data",), devices=devices[:8], axis_types=(jax.sharding.AxisType.Auto,))
