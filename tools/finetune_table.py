"""Measures PCRL against scratch with the fewest, 10 % and all labels of the data kit: results/finetune.csv.

Rows and pretraining runs that are there already are kept, so it goes on where it was stopped. Learning rate and schedule are chosen by the
validation part, for each arm and each number of labels alike; rows of split "valid" tell what was chosen. What it will cost is measured and printed first."""
import argparse, os, tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd

from pcrl.ablations import SCALES, Results, Trial, arms, different_draws, finetune_arm, labelled_ratio, pretrain_arm, table2
from pcrl.cases import Cases
from pcrl.reproduce import compare, outcome_sentence

root, METHODS = Path(__file__).resolve().parent.parent, (("scratch", "none"), ("pcrl", "robust"))
CELLS = dict(  # labelled cases, and what is other than at the small scale: all cases of a set want more crops, or fewer epochs
    adrenalmnist3d={24: {}, 119: {}, 1188: dict(tune_epochs=6)},
    nih_cxr14_subset={14: {}, 27: {}, 273: {}},
    hippocampus={1: {}, 11: {}, 108: dict(tune_crops=216, tune_epochs=12)})  # 2 and 5: results/ablations.csv


def trials(data: str, scale: str) -> list[Trial]:
    "One for each number of labelled cases, fewest first."
    base = SCALES[scale][data]
    return [replace(base, labelled=(n,), **(more if scale == "small" else {})) for n, more in CELLS[data].items()]


def finetunings_left(results: Results, cases: Cases, trial: Trial, seeds: Sequence[int], draws: Sequence[int]) -> int:
    "Those whose rows are missing."
    n, = trial.labelled
    there = lambda **key: len(results.rows(data=cases.name, ratio=labelled_ratio(cases, n), **key)) > 0
    drawn, left = different_draws(cases, n, draws), 0
    for method, recipe in METHODS:
        left += (len(trial.lrs) * len(trial.schedules) - 1) * len(drawn) * (not there(method=method, recipe=recipe, split="valid"))  # the way that is chosen is tested too
        left += sum(not there(method=method, recipe=recipe, split=draw, seed=seed) for seed in seeds for draw in drawn)
    return left


def seconds_of(cases: Cases, trial: Trial) -> float:
    "A finetuning's: one epoch and two are run, without the network's first call."
    once = lambda epochs: finetune_arm(cases, replace(trial, tune_epochs=epochs), *trial.labelled, None, 0, 0, trial.lrs[0])[2]
    one, two = once(1), once(2)
    return one + max(two - one, 0) * (trial.tune_epochs - 1)


def pretraining_left(cases: Cases, trial: Trial, runs: Path, seeds: Sequence[int]) -> float:
    "Seconds, by an epoch that is run."
    logs = [runs / f"{cases.name}-robust-pcrl-seed{seed}" / "log.csv" for seed in seeds]
    epochs = sum(trial.epochs - (len(pd.read_csv(log)) if log.exists() else 0) for log in logs)
    if not epochs: return 0.0
    with tempfile.TemporaryDirectory() as folder:
        return epochs * pretrain_arm(cases, trial, arms(cases.dims)["pcrl"], Path(folder) / "run", 0, 1)


def make(results: Results, cases: Cases, cells: Sequence[Trial], runs: Path, seeds: Sequence[int] = (0, 1, 2), draws: Sequence[int] = (0, 1, 2)):
    "All rows of a set."
    left = {t.labelled[0]: finetunings_left(results, cases, t, seeds, draws) for t in cells}
    cost = {t.labelled[0]: left[t.labelled[0]] * seconds_of(cases, t) for t in cells if left[t.labelled[0]]}
    before = pretraining_left(cases, cells[0], runs, seeds) if cost else 0.0
    each = "".join(f"; with {n} labelled {left[n]} finetunings, {seconds / 60:.0f} min" for n, seconds in cost.items())
    print(f"{cases.name}: {(before + sum(cost.values())) / 3600:.1f} hours to go: pretraining {before / 60:.0f} min{each}", flush=True)
    for trial in cells: table2(results, trial, cases, runs, ["robust"], seeds, draws, ["pcrl"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--out", type=Path, default=root / "results", help="folder of finetune.csv")
    parser.add_argument("--runs", type=Path, default=root / "finetune", help="folder of the pretraining runs")
    parser.add_argument("--scale", choices=["small", "smoke"], default="small", help="smoke: to see that it works")
    args = parser.parse_args()
    results = Results(args.out / "finetune.csv")
    for data in args.data:
        cells = trials(data, args.scale)
        make(results, cells[0].load(Path(os.environ["PCRL_DATA"])), cells, args.runs)
        print(outcome_sentence(compare(results.rows(data=data), "scratch")), flush=True)
