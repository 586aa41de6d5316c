"""AMC, evolution, random draws and the integer program on ResNet-20 at half the multiply-adds, 200 evaluations each.

The same environment for all: L2 order of channels, batch norms taken anew, 1,000 validation images, no training; every score is
kept as soon as it is known, so that a killed run goes on. Networks: resnet20, digits.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/budget_amc.py resnet20 0 1 2
"""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from results import keep, kept, record

from featherweight import Task
from featherweight.amc.agents import WAYS
from featherweight.amc.cuts import Counts, Cuts
from featherweight.amc.environment import Environment
from featherweight.tasks.digits import task as digits
from featherweight.tasks.training import tensor_loader

NAME, EVALUATIONS, TARGET = "budget_amc", 200, 0.5
IMAGES = 1000  # of the validation data


class Kept(dict[Counts, float]):
    """Scores by units, written to the disk as they come."""

    def __init__(self, partial: dict[str, Any], network: str) -> None:
        super().__init__({_counts(key): value for key, value in partial.get(network, {}).items()})
        self.partial, self.scores = partial, partial.setdefault(network, {})

    def __setitem__(self, counts: Counts, score: float) -> None:
        super().__setitem__(counts, score)
        self.scores[" ".join(map(str, counts))] = score
        keep(NAME, self.partial)


def main() -> None:
    """Run every way on every seed, and write the rows."""
    torch.set_num_threads(1)
    network, seeds = sys.argv[1], [int(seed) for seed in sys.argv[2:]] or [0]
    partial = kept(NAME)
    cuts = _cuts(network, Kept(partial, network))
    best: dict[str, list[float]] = {way: [] for way in WAYS}
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in seeds:
        for way, choose in WAYS.items():
            made = choose(Environment(cuts, TARGET * cuts.base), EVALUATIONS, seed)
            values = [max(value for value, _ in made[: index + 1]) for index in range(len(made))]
            best[way].append(values[-1])
            curves[way].append(values)
            sys.stdout.write(f"{network} seed {seed} {way}: {values[-1]:.4f}\n")
    if network != "resnet20":
        return
    marks = [25, 50, 100, 150, 200]
    table = [
        {"way": way, **{f"after {mark}": _told([curve[mark - 1] for curve in curves[way]]) for mark in marks}}
        for way in WAYS
    ]
    note = (
        f"ResNet-20, validation accuracy on {IMAGES} images without training at {TARGET:.0%} of the multiply-adds "
        f"(whole network {cuts.score:.4f}), {EVALUATIONS} evaluations each, of which the program spends "
        f"{6 * len(cuts.units)} on single groups; means over the seeds: "
        + ", ".join(f"{way} {mean(values):.4f}" for way, values in best.items())
    )
    for way in ("amc", "evolution"):
        gap = 100 * (mean(best[way]) - mean(best["program"]))
        record(NAME, f"budget.{way}.gap", round(gap, 4), len(seeds), note, {"table": table} if way == "amc" else None)


def _told(values: list[float]) -> str:
    return "not yet" if min(values) < -1 else f"{mean(values):.4f}"


def _counts(text: str) -> Counts:
    return tuple(int(part) for part in text.split())


def _cuts(network: str, known: Kept) -> Cuts:
    task = _task(network)
    images, labels = task.data.validate.dataset.tensors  # type: ignore[union-attr]
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]  # they lie sorted by class
    validate = tensor_loader(images[some], labels[some], 500)
    return Cuts(task.model, replace(task.data, validate=validate), known=known)


def _task(network: str) -> Task:
    if network == "digits":
        return digits()
    from cifar import task

    return task(network)


if __name__ == "__main__":
    main()
