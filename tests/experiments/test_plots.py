"""What the figures of comparisons and searches show, and what they say about bars, bands and grey points."""

import contextlib

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.figures import plots, style
from experiments.studies.jobs import Result


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Figures that were drawn, newest last, still open."""
    kept, real = [], style.drawn

    @contextlib.contextmanager
    def drawn(*args, **kwargs):
        with real(*args, **kwargs) as figure:
            kept.append(figure)
            yield figure

    monkeypatch.setattr(style, "drawn", drawn)
    return kept


def summary(arm, accuracy, seconds):
    return {
        "arm": arm, "label": arm.upper(), "seeds": 4, "test_accuracy": accuracy, "test_accuracy_std": 1.0,
        "seconds_low": seconds / 1.1, "seconds_median": seconds, "seconds_high": seconds * 1.1,
    }  # fmt: skip


def test_points_that_matter_have_their_names_and_what_was_not_tuned_is_grey(figures, tmp_path):
    rows = [summary("base", 80, 1), summary("sam", 84, 2), summary("gsam", 83, 2), summary("wsam", 10, 2)]
    plots.accuracy_over_cost(rows, tmp_path / "cost.png", tuned=("base", "sam"))
    (axis,) = figures[-1].axes
    assert [text.get_text() for text in axis.texts] == ["BASE", "SAM"]
    colours = {container.get_label(): container[0].get_color() for container in axis.containers}
    assert colours == {"BASE": "#000000", "SAM": "#0072B2", "GSAM": plots._GREY, "WSAM: 10.0 %": plots._GREY}
    assert axis.get_ylim()[0] > 60  # the failure does not press the others flat
    assert "± one standard error" in axis.get_title(loc="left")
    assert "grey: not tuned" in axis.get_title(loc="left")
    plots.accuracy_over_cost(rows, tmp_path / "cost.png")
    assert "grey" not in figures[-1].axes[0].get_title(loc="left")


def test_every_run_over_flatness_is_clipped_as_the_costs_are(figures, tmp_path):
    run = lambda arm, accuracy, size: Result(arm, 0, "", 1, accuracy, grad_norm=size, normalized_trace=size)
    groups = {
        "base": [run("base", 80.0, 1.0), run("base", 60.0, 2.0)], "sam": [run("sam", 84.0, 3.0)],
        "wsam": [run("wsam", 10.0, 1e-4)],
    }  # fmt: skip
    plots.accuracy_over_flatness(groups, {arm: arm for arm in groups}, tmp_path / "mechanism.png", ("base", "sam"))
    for axis in figures[-1].axes:
        assert axis.get_ylim()[0] > 35
        assert axis.get_xlim()[0] > 0.5  # the failure's is at the edge
    _, labels = figures[-1].axes[0].get_legend_handles_labels()
    assert labels == ["base", "sam", "wsam: 10.0 %"]


def test_every_column_of_the_trials_has_numbers(figures, tmp_path):
    trial = lambda **settings: {"accuracy": 80.0, "accuracy_std": 1.0, **settings}
    found = {
        "sam": [trial(learning_rate=rate, rho=0.1 / rate) for rate in (0.01, 0.1, 1.0)],
        "base": [trial(learning_rate=rate) for rate in (0.01, 0.1, 1.0)],
    }
    plots.trials(found, ["learning_rate", "rho"], tmp_path / "trials.png")
    visible = [axis for axis in figures[-1].axes if axis.get_visible()]
    assert len(visible) == 3
    for axis in visible:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert len(ticks) > 1
        assert all(tick.label1.get_visible() and tick.label1.get_text() for tick in ticks)
    assert "± one standard deviation" in figures[-1].get_suptitle()
