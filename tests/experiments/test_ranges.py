"""Options out of range, or that cannot stand together, are refused by name before anything is read or compiled."""

import dataclasses
import sys
import typing

import pytest

pytest.importorskip("orbax.checkpoint", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("tyro", reason="the experiments need pip install crsam_jax[experiments]")

from experiments import cli
from experiments.data import inputs
from experiments.settings import configs, ranges
from experiments.settings.configs import Figures
from experiments.settings.recipes import CrSam, Recipe
from experiments.training import program

TRAIN, COMPARE, TUNE = ("train", "digits"), ("compare", "digits"), ("tune", "digits")


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command line that is to fail before it touches anything; returns what it says."""

    def never(*args, **kwargs):
        raise AssertionError("this came too late")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments, "--out", str(tmp_path / "out")])
        assert cli.main() == 1
        [line] = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out").exists()
        return line

    for module, name in ((inputs, "load"), (program, "_program")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)
    return run


@pytest.mark.parametrize(
    ("command", "option", "value", "said"),
    [
        (TRAIN, "--batch-size", "0", "at least 1"),
        (TRAIN, "--epochs", "0", "at least 1"),
        (TRAIN, "--epochs", "-3", "at least 1"),
        (TRAIN, "--learning-rate", "-0.1", "at least 0"),
        (TRAIN, "--learning-rate", "nan", "at least 0"),
        (TRAIN, "--learning-rate", "inf", "at least 0"),
        (TRAIN, "--weight-decay", "-1e-4", "at least 0"),
        (TRAIN, "--momentum", "1", "in [0, 1)"),
        (TRAIN, "--momentum", "-0.1", "in [0, 1)"),
        (TRAIN, "--ema", "1", "in [0, 1)"),
        (TRAIN, "--warmup-epochs", "-1", "at least 0"),
        (TRAIN, "--warmup-epochs", "40", "less than --epochs, which is 40"),
        (TRAIN, "--sam.rho", "-0.1", "at least 0"),
        (TRAIN, "--crsam.alpha", "-0.1", "at least 0"),
        (TRAIN, "--crsam.max-penalty-ratio", "-1", "at least 0"),
        (TRAIN, "--msam.rho", "-0.1", "at least 0"),
        (TRAIN, "--s2sam.rho", "nan", "at least 0"),
        (TRAIN, "--late-start", "1.1", "in [0, 1]"),
        (TRAIN, "--seed", "-1", "in [0, 2147483647]"),
        (TRAIN, "--seed", "2147483648", "in [0, 2147483647]"),
        (TRAIN, "--accumulate", "0", "at least 1"),
        (TRAIN, "--model-options.width", "0", "at least 1"),
        (TRAIN, "--examples-per-class", "0", "at least 1"),
        (TRAIN, "--test-examples-per-class", "0", "at least 1"),
        (TRAIN, "--label-noise", "1.5", "in [0, 1]"),
        (TRAIN, "--validation-fraction", "1", "in [0, 1)"),
        (TRAIN, "--image-size", "0", "at least 1"),
        (TRAIN, "--keep", "0", "at least 1"),
        (TRAIN, "--keep-every", "0", "at least 1"),
        (TRAIN, "--checkpoint-steps", "0", "at least 1"),
        (TRAIN, "--checkpoint-seconds", "-1", "at least 0"),
        (TRAIN, "--log-steps", "-1", "at least 0"),
        (TRAIN, "--evaluate-every", "0", "at least 1"),
        (TRAIN, "--probe-examples", "-1", "at least 0"),
        (TRAIN, "--trace-probes", "1", "0, or at least 2"),
        (TRAIN, "--workers", "-1", "at least 0"),
        (TRAIN, "--devices", "0", "at least 1"),
        (COMPARE, "--seeds", "0", "at least 1"),
        (COMPARE, "--processes", "0", "at least 1"),
        (COMPARE, "--detect", "0", "greater than 0"),
        (COMPARE, "--batch-size", "-1", "at least 1"),
        (COMPARE, "--keep", "0", "at least 1"),
        (TUNE, "--trials", "0", "at least 1"),
        (TUNE, "--seeds", "0", "at least 1"),
        (("benchmark",), "--rounds", "1", "at least 2"),
        (("benchmark",), "--batch-size", "0", "at least 1"),
        (("benchmark",), "--width", "0", "at least 1"),
        (("readiness",), "--teraflops", "0", "greater than 0"),
        (("figures", "all", "nowhere"), "--surface-points", "1", "at least 2"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(command, option, value, said, refused):
    line = refused(*command, option, value)
    assert line.startswith(f"error: {option} must be ")
    assert said in line
    assert f"got {float(value):.10g}" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "digits", "--coordinator", "host:1"), "--coordinator is for one of several processes: add --distr"),
        (("train", "digits", "--num-processes", "2"), "--num-processes is for one of several processes"),
        (("train", "digits", "--distributed", "--num-processes", "2", "--process-id", "2"), "less than --num-proc"),
        (("train", "imagenet-resnet50", "--label-noise", "0.1"), "--label-noise is not for imagenet2012"),
        (("compare", "digits", "--methods", "base-0.001x"), "--epochs must be at least 1, got 0"),
        (("compare", "digits", "--methods", "sam,sam.rho=-1"), "--sam.rho must be at least 0, got -1"),
        (("tune", "digits", "--methods", "base", "--space", "momentum=0.5:2"), "--momentum must be in [0, 1)"),
    ],
)
def test_what_cannot_stand_together_is_refused(arguments, said, refused):
    assert said in refused(*arguments)


def test_every_number_has_a_range():
    def numbers(kind, prefix=""):
        for name, hint in typing.get_type_hints(kind).items():
            options = typing.get_args(hint) or (hint,)
            if dataclasses.is_dataclass(hint):
                yield from numbers(hint, f"{prefix}{name}.")
            elif typing.get_origin(hint) is not typing.Literal and {int, float} & set(options) and bool not in options:
                yield prefix + name

    for kind in (Recipe, configs.Run, configs.Compare, configs.Tune, configs.Benchmark, configs.Readiness, Figures):
        known = ranges.ranges_of(kind)
        assert set(known) == {name for name in numbers(kind) if name not in ("epochs",) or kind is Recipe}, kind


def test_the_recipes_are_in_range():
    from experiments.settings.recipes import RECIPES

    ranges.check(*RECIPES.values())
    ranges.check(dataclasses.replace(RECIPES["digits"], crsam=CrSam(0.0, 0.0, 0.0)))


def test_another_networks_options_are_refused(monkeypatch, capsys, tmp_path):
    for options, said in (
        (
            ["--set", "model_options.patch_size=4"],
            "option of convnet (see model_options) 'patch_size': there are width.",
        ),
        (
            ["--model", "resnet8", "--set", "model_options.depth=4"],
            "no option of resnet8 (see model_options) 'depth'",
        ),
        (["--dtype", "bfloat16"], "float32 alone"),
    ):
        monkeypatch.setattr(sys, "argv", ["experiments", "train", "digits", *options, "--out", str(tmp_path / "out")])
        assert cli.main() == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
