"""The language model's comparison: its text, rounding, and a miniature of all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.studies import language
from experiments.studies.language import ARMS, Setting, documentation, rounded, source_code

SMALL = Setting(evaluations=44, batch_size=4, length=16, width=16, depth=1, fine_tuning_steps=4, search_part=2)


def test_held_out_text_is_not_trained_on():
    for text in (documentation(64), source_code(64)):
        trained = np.lib.stride_tricks.sliding_window_view(np.asarray(text.train), 65)
        seen = {window.tobytes() for window in trained}
        shared = [window for window in np.asarray(text.held_out) if window.tobytes() in seen]
        assert text.held_out.size < len(text.train) / 5
        assert len(shared) < 0.02 * len(text.held_out)  # rules and blank lines


def test_rounding_has_fifteen_levels_a_column_and_leaves_vectors():
    x = jax.random.normal(jax.random.key(0), (200, 3)) * jnp.array([1.0, 10.0, 0.0])
    params = rounded({"kernel": x, "bias": x[0]})
    assert jnp.array_equal(params["bias"], x[0])
    for column, original in zip(params["kernel"].T, x.T, strict=True):
        assert len(np.unique(np.asarray(column))) <= 15
        step = jnp.max(jnp.abs(original)) / 7
        assert jnp.max(jnp.abs(column - original)) <= step / 2 * (1 + 1e-5)


@pytest.mark.slow
def test_a_miniature_is_complete_resumes_and_keeps_to_its_setting(tmp_path, capsys):
    results = language.language(2, tuple(ARMS), SMALL, tmp_path)
    assert [(row.arm, row.seed) for row in results] == [(arm, seed) for arm in ARMS for seed in (0, 1)]
    assert [row.steps for row in results[::2]] == [44, 40, 22, 22]  # at equal cost
    assert all(np.isfinite([row.loss, row.rounded_loss, row.forgetting, row.fine_tuned_loss]).all() for row in results)
    assert all(row.rho in ARMS[row.arm].radii for row in results)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {arm} |" in table for arm in ARMS)
    capsys.readouterr()
    assert language.language(2, tuple(ARMS), SMALL, tmp_path) == results
    assert "nats per character" not in capsys.readouterr().out  # nothing was trained again
    with pytest.raises(FileExistsError, match="another setting"):
        language.language(2, tuple(ARMS), SMALL._replace(width=32), tmp_path)


@pytest.mark.slow
def test_it_learns():
    text = documentation(SMALL.length)
    setting = SMALL._replace(evaluations=600, batch_size=16, width=32)
    loss = language.train("adamw", 0, 0.0, setting, text, None).loss
    assert loss < 2.9  # nats; of single characters' frequencies it is about 3.1
