"""The benchmark: what it compares, and what it writes."""

import csv
import dataclasses
import time
import types

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("rich", reason="the experiments need pip install crsam_jax[experiments]")

from flax import nnx

from experiments.costs import problems, steps, suite
from experiments.costs.benchmark import benchmark, timings
from experiments.settings import ranges
from experiments.settings.configs import Benchmark
from experiments.system import tables

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


MINIATURE = {
    "dense": lambda: problems.dense(8, 4, 8, 1),
    "language": lambda: problems.language(4, 6, 10, 8, 1, 2),
}


@pytest.fixture
def miniature(monkeypatch):
    monkeypatch.setattr(suite, "NETWORKS", MINIATURE)
    monkeypatch.setattr(suite, "PROGRAMS", ("SGD", "sam", "msam"))


def test_everything_is_timed_once_and_the_most_important_first(miniature, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{suite._BEGIN}\nold\n{suite._END}\n\nafter\n")
    config = Benchmark(all=True, rounds=2, out=tmp_path / "rows.csv", page=page)
    benchmark(config)
    rows = tables.read(config.out, suite.Row)
    expected = [(network, program) for program in suite.PROGRAMS for network in MINIATURE]
    assert [(row.network, row.program) for row in rows] == expected
    for row in rows:
        assert row.over_sgd == pytest.approx(row.median_ms / row.sgd_ms)
        assert row.over_floor == pytest.approx(row.over_sgd / (2 if row.program == "sam" else 1))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert suite.table(rows) in text
    assert "old" not in text
    before = config.out.read_text()
    capsys.readouterr()
    benchmark(config)
    assert config.out.read_text() == before
    assert "| sam |" in capsys.readouterr().out


def test_what_was_timed_before_a_cut_is_kept(miniature, tmp_path, monkeypatch):
    config = Benchmark(all=True, rounds=2, out=tmp_path / "rows.csv")
    real, timed = suite._timed, []

    def cut(kind, network, program, *rest):
        if len(timed) == 3:
            raise KeyboardInterrupt
        timed.append((network, program))
        return real(kind, network, program, *rest)

    monkeypatch.setattr(suite, "_timed", cut)
    with pytest.raises(KeyboardInterrupt):
        suite.run(config)
    text = config.out.read_text()
    assert len(tables.read(config.out, suite.Row)) == 3
    config.out.write_text(text + "cpu,dense,8")  # a row in writing
    monkeypatch.setattr(suite, "_timed", real)
    rows = suite.run(config)
    assert config.out.read_text().startswith(text)
    assert len({(row.network, row.program) for row in rows}) == len(rows) == 6


def test_the_budget_ends_it(miniature, tmp_path, monkeypatch, capsys):
    now = iter(range(0, 10_000, 100))  # each look at the clock is 100 s later
    clock = types.SimpleNamespace(monotonic=lambda: next(now), perf_counter=time.perf_counter)
    monkeypatch.setattr(suite, "time", clock)
    rows = suite.run(Benchmark(all=True, rounds=2, budget=700.0, out=tmp_path / "rows.csv"))
    assert [(row.network, row.program) for row in rows] == [("dense", "SGD"), ("language", "SGD")]
    assert "dense, sam: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_every_program_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "NETWORKS", MINIATURE)
    rows = suite.run(Benchmark(all=True, rounds=2, out=tmp_path / "rows.csv"))
    assert {(row.network, row.program) for row in rows} == {(n, p) for n in MINIATURE for p in suite.PROGRAMS}


def test_the_language_model_does_not_see_what_follows():
    model = problems.Language(6, 10, 8, 1, 2, nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 1, 10)
    early = model(tokens)[:, :3]
    np.testing.assert_allclose(model(tokens.at[:, 3:].set(0))[:, :3], early, rtol=1e-5, atol=1e-6)
    assert not np.allclose(model(tokens.at[:, 0].set(0))[:, :3], early, atol=1e-3)


def test_a_page_without_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table"):
        suite.write_page(page, "table")
    with pytest.raises(ValueError, match="--page is for the tables of --all"):
        ranges.check(Benchmark(page=page))
    with pytest.raises(ValueError, match="give one of them"):
        ranges.check(Benchmark(all=True, target="h100"))
