"""The settings of the digits comparison, chosen for each method on the validation split."""

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from experiments import configs, runs
from experiments.methods import with_settings
from experiments.training import Program, make_program, make_task, train

_SEEDS = range(100, 105)  # seeds that the comparison does not use
_LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
_RHOS = (0.1, 0.2, 0.4, 0.8)
_ALPHAS_BETAS = ((0.1, 0.01), (0.5, 0.1))


class Trial(NamedTuple):
    """One row: a method's settings, and the validation split at the last epoch, mean over the seeds."""

    method: str
    settings: str
    accuracy: float
    accuracy_std: float
    loss: float


def tune(config: configs.Digits, out: Path | None = None) -> Path:
    """Writes trials.csv and prints the best settings of each method by mean validation accuracy."""
    folder = runs.new_folder("tune-digits", out)
    runs.save_config(config, folder)
    with runs.CsvWriter(folder / "trials.csv", Trial) as writer:
        for method, candidates in _candidates(config).items():
            program = make_program(config, method)
            trials = []
            for settings in track(candidates, description=method):
                trials.append(_trial(method, with_settings(config, method, settings), program))
                writer.write(trials[-1])
            print(max(trials, key=lambda trial: trial.accuracy))
    print(f"All trials: {folder / 'trials.csv'}")
    return folder


def _candidates(config: configs.Digits) -> dict[str, list[configs.Settings]]:
    sam_grid = itertools.product(_LEARNING_RATES, _RHOS)
    crsam_grid = itertools.product(_LEARNING_RATES, _RHOS, _ALPHAS_BETAS)
    return {
        "sgd": [configs.Sgd(learning_rate) for learning_rate in _LEARNING_RATES],
        "sam": [configs.Sam(learning_rate, rho) for learning_rate, rho in sam_grid],
        "crsam": [
            dataclasses.replace(config.crsam, learning_rate=learning_rate, rho=rho, alpha=alpha, beta=beta)
            for learning_rate, rho, (alpha, beta) in crsam_grid
        ],
    }


def _trial(method: str, config: configs.Digits, program: Program) -> Trial:
    last = []
    for seed in _SEEDS:
        *_, record = train(config, method, seed, make_task(config, seed, evaluate_on="validation"), program)
        last.append(record)
    accuracies = [record.test_accuracy for record in last]
    loss = statistics.fmean(record.test_loss for record in last)
    return Trial(method, str(getattr(config, method)), statistics.fmean(accuracies), statistics.stdev(accuracies), loss)
