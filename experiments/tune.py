"""The settings of the digits comparison, chosen on the validation split: first for SGD, then for each method.

Every method has the learning rate and the weight decay that are best for SGD, so the search favours SGD.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.progress import track

from experiments import configs, runs
from experiments.training import make_program, make_task, train

_SEEDS = range(100, 103)  # seeds that the comparison does not use
_RHOS = (0.05, 0.1, 0.2, 0.4, 0.8)


class Trial(NamedTuple):
    """One row: settings, and the validation split at the last epoch, mean over three seeds."""

    method: str
    learning_rate: float
    weight_decay: float
    rho: float
    alpha: float
    beta: float
    accuracy: float
    accuracy_std: float
    loss: float


def tune(config: configs.Digits, out: Path | None = None) -> Path:
    """Writes trials.csv and prints the best settings of each method by mean validation accuracy."""
    folder = runs.new_folder("tune-digits", out)
    runs.save_config(config, folder)
    with runs.CsvWriter(folder / "trials.csv", Trial) as writer:

        def search(method: str, candidates: list[configs.Digits]) -> configs.Digits:
            trials = []
            for candidate in track(candidates, description=method):
                trials.append(_trial(method, candidate))
                writer.write(trials[-1])
            best, found = max(zip(trials, candidates, strict=True), key=lambda pair: pair[0].accuracy)
            print(best)
            return found

        config = search("sgd", list(_sgd_candidates(config)))
        config = search("sam", [dataclasses.replace(config, sam=configs.Sam(rho)) for rho in _RHOS])
        search("crsam", list(_crsam_candidates(config)))
    print(f"All trials: {folder / 'trials.csv'}")
    return folder


def _sgd_candidates(config: configs.Digits) -> Iterator[configs.Digits]:
    for learning_rate, weight_decay in itertools.product((0.03, 0.1, 0.3), (5e-4, 5e-3)):
        yield dataclasses.replace(config, learning_rate=learning_rate, weight_decay=weight_decay)


def _crsam_candidates(config: configs.Digits) -> Iterator[configs.Digits]:
    for rho, (alpha, beta) in itertools.product(_RHOS, ((0.1, 0.01), (0.5, 0.1))):
        yield dataclasses.replace(config, crsam=dataclasses.replace(config.crsam, rho=rho, alpha=alpha, beta=beta))


def _trial(method: str, config: configs.Digits) -> Trial:
    program = make_program(config, method)
    last = []
    for seed in _SEEDS:
        *_, record = train(config, method, seed, make_task(config, seed, evaluate_on="validation"), program)
        last.append(record)
    rho, alpha, beta = {
        "sgd": (0.0, 0.0, 0.0),
        "sam": (config.sam.rho, 0.0, 0.0),
        "crsam": (config.crsam.rho, config.crsam.alpha, config.crsam.beta),
    }[method]
    accuracies = [record.test_accuracy for record in last]
    return Trial(
        method, config.learning_rate, config.weight_decay, rho, alpha, beta,
        statistics.fmean(accuracies), statistics.stdev(accuracies), statistics.fmean(r.test_loss for r in last),
    )  # fmt: skip
