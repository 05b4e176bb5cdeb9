"""The installed command: its help, what it says without its packages, and which packages the wheel holds."""

import configparser
import inspect
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import cli, launcher

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_list_of_commands_has_the_help_of_each(command):
    assert cli._stub(command).__doc__ == inspect.getdoc(cli._function(command))


def test_help_names_the_command_that_was_started(monkeypatch, capsys):
    for started, named in (("/x/bin/crsam-experiments", "crsam-experiments"), ("__main__.py", "python -m experiments")):
        monkeypatch.setattr("sys.argv", [started, "list", "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().out.startswith(f"usage: {named} ")


def test_without_its_packages_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_NEEDED", ("jax", "no_such_package"))
    assert launcher.main() == 1
    said = capsys.readouterr().err
    assert "(no_such_package): pip install" in said
    assert said.count("\n") == 1


def test_the_wheel_lists_every_package_of_the_experiments():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    listed = {name for name in config["options"]["packages"].split() if name.startswith("crsam_jax_experiments.")}
    folders = {path.parent for path in (ROOT / "experiments").rglob("__init__.py")} - {ROOT / "experiments/launcher"}
    assert listed == {"crsam_jax_experiments." + ".".join(path.relative_to(ROOT).parts) for path in folders}
    assert launcher.ROOT == ROOT
