"""Files written by others: every value is checked by name before anything is built, and nothing is a traceback."""

import dataclasses
import json
import sys

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tyro", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import cli
from experiments.data import inputs
from experiments.settings import recipes
from experiments.studies import jobs
from experiments.studies.jobs import Job
from experiments.system import files, tables
from experiments.training import logs, program, run_folder
from experiments.training.logs import EpochRow

SETTINGS = json.loads(json.dumps(dataclasses.asdict(recipes.get("digits-convnet"))))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Trains a recipe of a file, which has to fail before it touches anything; returns what it says."""

    def never(*args, **kwargs):
        raise AssertionError("this came too late")

    for module, name in ((inputs, "load"), (program, "_program")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)

    def run(content):
        file = tmp_path / "recipe.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["experiments", "train", str(file), "--out", str(tmp_path / "out")])
        assert cli.main() == 1
        [line] = capsys.readouterr().err.splitlines()
        assert len(line) < 1000
        assert not (tmp_path / "out").exists()
        return line

    return run


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"per_method": {"base": None}}, "per_method.base must be settings by name, got 'None'"),
        ({"per_method": {"base": [1]}}, "per_method.base must be settings by name"),
        ({"per_method": None}, "per_method must be of type dict"),
        ({"per_method": {"samm": {"learning_rate": 0.1}}}, "no arm in per_method 'samm': did you mean 'sam'"),
        ({"per_method": {"sam": {"learning_rte": 0.1}}}, "per_method.sam: There is no setting 'learning_rte': did you"),
        ({"per_method": {"sam": {"learning_rate": "0.1"}}}, "per_method.sam: learning_rate must be of type float"),
        ({"per_method": {"sam": {"learning_rate": -1}}}, "per_method.sam: --learning-rate must be at least 0"),
        ({"model_options": {"width": "4"}}, "--model-options.width must be a whole number, got '4'"),
        ({"model_options": {"width": 4.0}}, "--model-options.width must be a whole number, got 4.0"),
        ({"model_options": {"width": None}}, "--model-options.width must be a whole number, got None"),
        ({"model_options": {"width": [4]}}, "--model-options.width must be a whole number"),
        ({"model_options": {"width": True}}, "--model-options.width must be a whole number"),
        ({"model_options": {"width": 10**30}}, "--model-options.width must be at least 1"),
        ({"model_options": {"widht": 4}}, "no model option 'widht': did you mean 'width'"),
        ({"model_options": {"stage_sizes": []}}, "--model-options.stage-sizes must be a list of whole numbers"),
        ({"model_options": {"stage_sizes": [1, "1"]}}, "must be a list of whole numbers"),
        ({"model_options": {"stem": 3}}, "--model-options.stem must be a text"),
        ({"model_options": None}, "model_options must be of type dict"),
        ({"epochs": None}, "epochs must be of type int, got None"),
        ({"epochs": 2.5}, "epochs must be of type int"),
        ({"epochs": 10**400}, "epochs must be less than"),
        ({"learning_rate": 10**400}, "learning_rate must be less than"),
        ({"crsam": None}, "crsam must be of type CrSam"),
        ({"crsam": {"rho": "0.1"}}, "crsam.rho must be of type float"),
        ({"crsam": {"roh": 0.1}}, "no setting 'crsam.roh': did you mean 'crsam.rho'"),
        ({"crsam": {"penalty": "lnear"}}, "no value of crsam.penalty 'lnear': did you mean 'linear'"),
        ({"seed": True}, "seed must be of type int"),
        ({"dataset": ["digits"]}, "dataset must be of type str, got ['digits']"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_each_value_is_checked_by_name(changes, said, refused):
    assert said in refused(SETTINGS | changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (nested(100_000), "nested too deeply"),
        ('{"a": ' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ('{"epochs": 1, "epochs": 2}', "the key 'epochs' stands twice"),
        ('{"crsam": {"rho": 1, "rho": 2}}', "the key 'rho' stands twice"),
        ('{"epochs": ' + "9" * 5000 + "}", "is damaged, or not JSON"),
        ('"text"', "it holds str"),
        ("\ufeff{}", "This is no recipe"),
        ("", "is damaged, or not JSON"),
    ],
)
def test_each_mistake_of_json_is_one_line(content, said, refused):
    assert said in refused(content)


def test_a_bytes_mark_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match="damaged, or not JSON"):
        files.read_json(tmp_path / "config.json")


def test_settings_on_the_command_line_are_checked_alike():
    from experiments.settings.overrides import parse

    with pytest.raises(ValueError, match="stands twice"):
        parse(['model_options={"width": 1, "width": 2}'])
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(["model_options=" + nested(100_000)])


def test_a_config_whose_epochs_are_null_is_another_run(tmp_path):
    recipe = recipes.get("digits-convnet")
    for value in (None, "10", [1], {"a": 1}):
        (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"epochs": value}))
        with pytest.raises(FileExistsError, match="holds another run"):
            run_folder.check_free(recipe, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"model": "x" * 100_000}))
    with pytest.raises(FileExistsError) as error:
        run_folder.check_free(recipe, tmp_path)
    assert len(str(error.value)) < 1500


def test_tables_and_logs_of_others(tmp_path):
    file = tmp_path / "metrics.csv"
    for text in ("epoch\n" + "1" * 200_000 + "\n", "epoch,step\n1,2,3,4\n", "epoch\n\x00\n", "a,b\n1,2\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="is damaged") as error:
            tables.read(file, EpochRow)
        assert len(str(error.value)) < 500
    steps = tmp_path / "steps.jsonl"
    for line in ("[1]", "{}", '{"step": "1"}', '{"step": 1, "step": 2}', nested(100_000), "{"):
        steps.write_text(line + "\n")
        with pytest.raises(ValueError, match="is damaged"):
            logs.read_steps(steps)


def test_a_damaged_note_of_a_failure_is_named(tmp_path):
    job = Job("base", recipes.get("digits-convnet"), tmp_path)
    for text in ("{", "{}", '{"chance": "10", "error": "x"}'):
        (tmp_path / "failed.json").write_text(text)
        with pytest.raises(ValueError, match=r"failed\.json is damaged"):
            jobs.read_result(job)
