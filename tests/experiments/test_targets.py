"""Programs for devices that are not here: what is read from them, and what the compilers themselves say."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("rich", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.costs import readiness, targets
from experiments.costs.benchmark import costs
from experiments.costs.targets import Memory, Target, count, memory_of
from experiments.settings import recipes
from experiments.settings.configs import Benchmark, Readiness

TINY = Benchmark(model="convnet", width=8, batch_size=8, image_size=8)


@pytest.fixture
def h100():
    pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs needs pip install crsam_jax[targets]")
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        pytest.skip("where CUDA itself is not installed, jax loads the compiler for GPUs with JAX_PLATFORMS=cpu alone")
    return targets.find


@pytest.fixture
def tpus():
    pytest.importorskip("libtpu", reason="the compiler for TPUs needs pip install crsam_jax[targets]")
    return targets.find


def here(mesh, memory=None):
    return Target("here", mesh, {}, memory)


def gradient_step(w, x):
    return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)


def lowered(target, size=64, batch=512):
    shapes = jax.ShapeDtypeStruct((size, size), jnp.float32), jax.ShapeDtypeStruct((batch, size), jnp.float32)
    step = jax.jit(gradient_step, donate_argnums=0, out_shardings=target.everywhere)
    return step.lower(target.placed(shapes[0]), target.placed(shapes[1], "data"))


def test_kernels_are_those_of_the_entry_and_collectives_those_of_all():
    text = """HloModule step

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %c = f32[8]{0} copy(%p)
  ROOT %t = f32[8]{0} transpose(%c), dimensions={0}
}

%body (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%q), dimensions={0}
}

ENTRY %main (x: f32[8], y: f32[8]) -> (f32[8], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0:T(256)} parameter(1)
  %loop = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %gemm = (f32[8]{0}, s8[16]{0}) custom-call(%loop, %y), custom_call_target="__cublas$gemm"
  %first = f32[8]{0} get-tuple-element(%gemm), index=0
  %start = f32[8]{0} all-reduce-start(%first), to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  %called = f32[8]{0} call(%done), to_apply=%body
  %laid = f32[8]{0:T(256)S(1)} copy(%y), backend_config={"estimated_cycles":"20"}
  ROOT %tuple = (f32[8]{0}, f32[8]{0}) tuple(%called, %laid)
}
"""
    counts = count(text)
    assert counts[:3] == (3, 120, {"all-gather": 1, "all-reduce": 1})
    assert counts.collective_bytes == {"all-gather": 32, "all-reduce": 32}
    assert counts.sent_bytes == 0  # a program of one device
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        count("nothing")


def test_bytes_are_those_of_whole_arrays_and_a_ring_sends_them():
    text = """HloModule step, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[8] {
  %x = f32[16]{0} parameter(0)
  %a = (f32[16]{0}, /*index=1*/bf16[4,8]{1,0:T(8,128)S(1)}) all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}
  %start = ((f32[2]{0}), f32[16]{0}) all-gather-start(%x), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %scattered = f32[4]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %again = f32[4]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  ROOT %moved = pred[8]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
}
"""
    counts = count(text)
    assert counts.collectives == {"all-gather": 1, "all-reduce": 1, "collective-permute": 1, "reduce-scatter": 1}
    expected = {"all-gather": 64, "all-reduce": 64 + 64, "collective-permute": 8, "reduce-scatter": 64}
    assert counts.collective_bytes == expected
    assert counts.sent_bytes == 128 * 2 // 2 + 64 * 7 // 8 + 64 * 3 // 4 + 8


def test_a_batch_divided_among_devices_is_one_all_reduce(mesh):
    compiled = here(mesh).compile(lowered(here(mesh)))
    assert count(compiled.as_text()).collectives == {"all-reduce": 1}


def test_memory_counts_donated_arguments_once(mesh):
    used = memory_of(here(mesh), lowered(here(mesh)))
    weights, part = 4 * 64 * 64, 4 * 512 // 8 * 64  # on each device, float32
    assert used.fits
    assert weights + part <= used.used - used.temporaries < weights + part + 4096
    assert not memory_of(here(mesh, memory=used.used - 1), lowered(here(mesh))).fits
    assert memory_of(here(mesh, memory=used.used), lowered(here(mesh))).fits


class Refused:
    """A lowered program whose compiler says no."""

    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_is_too_large_for_its_compiler_does_not_fit(mesh):
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required (56.25G) exceeds (15.75G)."
    assert memory_of(here(mesh), Refused(message)) == Memory(int(56.25 * 2**30), None, False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory_of(here(mesh), Refused("INTERNAL: 12.5G of something else"))


@pytest.mark.parametrize("name", ["h100", "v5e:2x2"])
def test_a_missing_compiler_names_its_extra(monkeypatch, name):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=rf"--target {name} .*pip install 'crsam_jax\[targets\]'"):
        targets.find(name)


def test_what_is_no_target_is_refused():
    with pytest.raises(ValueError, match=r"no target 'a100'.*h100, or a topology of TPUs"):
        targets.find("a100")
    with pytest.raises(ValueError, match="--devices is for a --target"):
        readiness.readiness(["digits-convnet"], Readiness(devices=2))
    with pytest.raises(ValueError, match="--target h100 is what to compile for: add --compile"):
        readiness.readiness(["digits-convnet"], Readiness(target="h100"))


def test_the_table_says_what_does_not_fit(mesh):
    fits, not_so = Memory(2_000_000, 1_000_000, True), Memory(99_000_000_000, None, False)
    rows = [readiness.Estimate("r", "sam", 1, 1.0, 1, 500_000, memory) for memory in (fits, not_so)]
    *_, first, second = readiness.table(rows, 1.0, here(mesh)).splitlines()
    assert first.endswith("| 0 | 1 | 2 | yes | 0.0 |")
    assert second.endswith("| 0 | – | 99,000 | no | 0.0 |")


@pytest.mark.slow
def test_steps_for_an_h100_and_their_floor(h100):
    rows = {row["program"]: row for row in costs(dataclasses.replace(TINY, target="h100"))}
    sgd = rows["SGD"]
    assert sgd["unit"] == "launches"
    assert sgd["over_sgd"] == sgd["over_floor"] == 1
    assert 5 < sgd["cost"] < 200
    assert rows["optax.contrib.sam"]["over_floor"] == pytest.approx(1, abs=0.15)
    for row in rows.values():
        assert row["over_floor"] == pytest.approx(row["cost"] / sgd["cost"] / row["points"])
        assert row["collectives"] == ""
    assert rows["crsam, ordered"]["temporary_bytes"] < rows["crsam, vmap"]["temporary_bytes"]


def test_several_h100s_divide_a_batch(h100):
    one, four = h100("h100"), h100("h100", 4)
    assert (one.mesh.size, four.mesh.size) == (1, 4)
    compiled = four.compile(lowered(four))
    assert count(compiled.as_text()).collectives == {"all-reduce": 1}
    whole, quarter = (memory_of(target, lowered(target, batch=2**21)) for target in (one, four))
    assert quarter.used < 0.3 * whole.used
    too_much = memory_of(one, lowered(one, batch=2**30))
    assert not too_much.fits
    assert too_much.used > 85e9


def test_readiness_for_an_h100(h100):
    recipe = dataclasses.replace(recipes.get("digits-convnet"), batch_size=10_000, examples_per_class=1000)
    one, two = (readiness.estimates("digits", recipe, {}, ["base"], h100("h100", count))[0] for count in (1, 2))
    assert one.memory.fits
    assert one.memory.used > one.state_bytes + one.memory.temporaries
    assert two.memory.temporaries < 0.8 * one.memory.temporaries
    assert two.flops == one.flops


def test_a_topology_of_tpus(tpus):
    assert tpus("v5e:2x2").mesh.size == 4
    target = tpus("v5e:2x2", 2)
    counts = count(target.compile(lowered(target)).as_text())
    assert counts.cycles > 1000
    assert counts.collectives == {"all-reduce": 1}
    with pytest.raises(ValueError, match="--devices 5, but v5e:2x2 has 4"):
        tpus("v5e:2x2", 5)
    with pytest.raises(ValueError, match="knows no topology 'v99:2x2'"):
        tpus("v99:2x2")


def test_what_a_tpu_has_no_memory_for_is_refused_by_its_compiler(tpus):
    target = tpus("v5e:2x2", 1)
    assert memory_of(target, lowered(target)).fits
    large = memory_of(target, lowered(target, batch=2**27))
    assert not large.fits
    assert large.used >= 4 * 64 * 2**27  # the batch alone
