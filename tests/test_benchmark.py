"""The benchmark: what it compares, and what it writes."""

import csv
import dataclasses

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("rich", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.benchmark import benchmark, steps, timings
from experiments.configs import Benchmark

TINY = Benchmark(model="convnet", width=4, batch_size=4, image_size=8, rounds=2)


@pytest.fixture(autouse=True)
def compilation_cache():
    """As it was: the benchmark turns it off."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_optax_sam_is_the_same_method():
    """One step of optax's SAM and one of ours end at the same params: the benchmark compares like with like."""
    loss_fn, (params, model_state), batch = steps.make_loss(TINY), steps.initial(TINY), steps.batch(TINY)
    compared = {method.name: method.tx for method in steps.methods(loss_fn, optax.sgd(0.1, momentum=0.9))}
    updates = {}
    for name in ("optax.contrib.sam", "sam"):
        step = jax.jit(steps.make_step(loss_fn, compared[name]))
        updates[name], _, _, loss = step(params, model_state, compared[name].init(params), batch)
        assert float(loss) == pytest.approx(float(loss_fn(params, model_state, **batch)[0]), rel=1e-5)
    gradient = jax.grad(loss_fn, has_aux=True)(params, model_state, **batch)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, updates["sam"], updates["optax.contrib.sam"])
    with pytest.raises(AssertionError):  # and it is not plain SGD
        jax.tree.map(lambda u, g: close(u, -0.1 * g), updates["sam"], gradient)


@pytest.mark.slow
def test_the_benchmark_here_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "rows" / "here.csv"
    benchmark(dataclasses.replace(TINY, out=out))
    with out.open() as file:
        rows = {row["program"]: row for row in csv.DictReader(file)}
    assert set(rows) == {f"{k} × value_and_grad" for k in (1, 2, 3)} | {
        "optax.contrib.sam", "sam", *(f"crsam, {how}" for how in steps.STRATEGIES)
    }  # fmt: skip
    assert [rows[name]["points"] for name in ("3 × value_and_grad", "sam", "crsam, ordered")] == ["3", "2", "3"]
    for row in rows.values():
        floor = rows[f"{row['points']} × value_and_grad"]
        assert float(row["over_floor"]) == pytest.approx(float(row["median_ms"]) / float(floor["median_ms"]))
    assert int(rows["crsam, ordered"]["temporary_bytes"]) < int(rows["crsam, sequential"]["temporary_bytes"])
    printed = capsys.readouterr().out
    assert f"| sam | {float(rows['sam']['median_ms']):.1f} |" in printed


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="--devices is for a --target"):
        timings(Benchmark(devices=4))
    with pytest.raises(ValueError, match="did you mean 'resnet8' or 'resnet18'"):
        steps.make_loss(Benchmark(model="resnet81"))
    with pytest.raises(ValueError, match="ConvNet computes in float32 alone"):
        steps.make_loss(Benchmark(dtype="bfloat16"))
