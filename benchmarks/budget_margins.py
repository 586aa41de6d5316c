"""Joint allocation against single techniques and fixed pipelines: size budgets, identical healing, three seeds.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/budget_margins.py [--networks mlp lstm lenet300 resnet20 resnet56 vgg19 minilm]
        [--seeds 0 1 2] [--budgets 0 1 2 3 4] [--ways joint prune ...]

`joint` is `compress` without a recipe. Every other way is a recipe with one strength, the mildest whose untrained file fits;
where the trained file does not, the strength is raised until it does. All train for the same epochs, with the same teacher and
the learning rates that the joint search chose, of which it tries up to three: LeNet-300-100 for 6 epochs, the LSTM for 3, the
networks of CIFAR-10 and MiniLM three times on 100 batches. The joint search compares its mixes by trainings: where those are
quick, 14 mixes half as long and the better 7 as long as a trial, by validation data alone; every other way is tuned on nothing,
and the best of eight is picked by test accuracy. A way that cannot be so small at any strength has no accuracy. The margin of a
budget is the test accuracy of joint minus that of the best other way, means over the seeds. A cell that is done is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cifar
import letters
import sentiment
import speech
from results import keep, kept, record
from torch import nn

from featherweight import Context, Recipe, Task, compress, run
from featherweight.allocation import Healing
from featherweight.artifact import compact, package
from featherweight.data import Shortened
from featherweight.edits import Write, to_json
from featherweight.job import training_epochs
from featherweight.measurement import structure
from featherweight.mixes import EVERY
from featherweight.portable import Graph, export_graph
from featherweight.recipe_files import recipe_from_json
from featherweight.tasks import mnist
from featherweight.technique import Technique
from featherweight.techniques import (
    Distill,
    FactorRecurrent,
    FoldBatchNorm,
    LowRank,
    PruneChannels,
    PruneWeights,
    QuantizeWeights,
)

NAME = "budget_margins"
EDGE = 0.3  # points
SMALLER = 0.85  # of the bytes of the best other way, at which a joint network as accurate wins too
_STEPS = 10  # halvings of a strength
_RAISED = 6  # times that a strength is raised where the trained file does not fit
Cell = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A network and its budgets.

    Attributes:
        task: of a seed.
        factors: how many times smaller than the original the file must be.
        epochs: of all training of a candidate; None for as long as `compress` trains it.
        batches: of an epoch; None for all.
    """

    task: Callable[[int], Task]
    factors: tuple[float, ...]
    epochs: int | None = None
    batches: int | None = None


NETWORKS = {
    "mlp": Network(letters.task, (12, 20, 32, 50, 75)),
    "lstm": Network(speech.task, (15, 25, 40, 60, 90), 3),
    "lenet300": Network(mnist.lenet300_task, (20, 40, 70, 100, 140), 6),
    "resnet20": Network(partial(cifar.task, "resnet20"), (8, 12, 16, 22, 30), 3, 100),
    "resnet56": Network(partial(cifar.task, "resnet56"), (12, 24), 3, 100),
    "vgg19": Network(partial(cifar.judged, "vgg19"), (25, 75), 3, 100),
    "minilm": Network(sentiment.task, (10, 20), 3, 100),
}


def opened(network: Network, seed: int) -> Task:
    """Return the network of a seed and its data."""
    task = network.task(seed)
    if network.batches is None or task.data.train is None:
        return task
    return replace(task, data=replace(task.data, train=Shortened(task.data.train, network.batches)))


def steps(way: str, strength: float, healing: Healing, model: nn.Module) -> Recipe:
    """Return the recipe of a way at a strength from 0 to 1; a healing of 0 epochs leaves training out."""
    ratio, epochs = round(min(0.999, strength), 4), healing.epochs
    heal: list[Technique] = [Distill(epochs=epochs, learning_rate=healing.rate)] if epochs else []
    end: list[Technique] = [Distill(epochs=healing.last, learning_rate=healing.last_rate)] if healing.last else []
    recurrent = any(isinstance(module, nn.LSTM) for module in model.modules())
    factored: list[Technique] = [LowRank(rank="spread", ratio=min(ratio, 0.98), method="whitened")]
    if recurrent:
        factored = [FactorRecurrent(rank="spread", ratio=min(ratio, 0.98), hidden="factors")]
    cut = PruneChannels(ratio=min(ratio, 0.98), importance="obs", reconstruct=True)
    pruned = PruneWeights(ratio=ratio, epochs=epochs, learning_rate=healing.rate)
    uniform = PruneWeights(ratio=ratio, ranking="layer", epochs=epochs, learning_rate=healing.rate)
    rounded = QuantizeWeights(bits=4, per_channel=False)
    ways: dict[str, list[Technique]] = {
        "quantize": [*heal, QuantizeWeights(bits=max(2, round(8 - 6 * strength)), per_channel=False), *end],
        "prune": [pruned, *end],
        "low rank": [*factored, *heal, *end],
        "channels": [cut, *heal, *end],
        "prune, quantize": [pruned, rounded, *end],
        "uniform prune, quantize": [uniform, rounded, *end],
        "low rank, quantize": [*factored, *heal, rounded, *end],
        "channels, quantize": [cut, *heal, rounded, *end],
    }
    norms = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    return Recipe((*([FoldBatchNorm()] if norms else []), *ways[way]))


WAYS = (
    "joint",
    "quantize",
    "prune",
    "low rank",
    "channels",
    "prune, quantize",
    "uniform prune, quantize",
    "low rank, quantize",
    "channels, quantize",
)


def cell(task: Task, way: str, budget: int, seed: int, most: int | None, pace: float) -> Cell:
    """Return bytes and test accuracy of a way at a budget in bytes, or that it cannot be so small.

    Args:
        task: the network of a seed and its data.
        way: of `WAYS`.
        budget: bytes.
        seed: of all draws.
        most: epochs in all, or None for what `compress` allows.
        pace: factor on the usual learning rates, of all ways but the joint search, which chooses it.
    """
    start = time.perf_counter()
    limit = f"size<={budget}B"
    healing = Healing.of(training_epochs(task.data, structure(task.model, task.data).macs or 0, most), pace)
    if way == "joint":
        artifact = compress(task.model, task.data, limit, seed=seed, trials=EVERY, epochs=most, progress=_say)
        report, pace = artifact.report, _pace(recipe_from_json(artifact.facts["recipe"]))
    else:
        wanted = float(budget)
        strength = _mildest(task, way, budget, seed)
        for _ in range(_RAISED):
            if strength is None:
                return {"bytes": None, "why": "no strength is so small", "seconds": round(time.perf_counter() - start)}
            recipe = steps(way, strength, healing, task.model)
            report = compress(task.model, task.data, limit, recipe, seed=seed, progress=_say).report
            if report.after["size_bytes"] <= budget:
                break
            wanted *= 0.995 * budget / report.after["size_bytes"]
            strength = _mildest(task, way, round(wanted), seed)
    return {
        "bytes": report.after["size_bytes"],
        "met": report.after["size_bytes"] <= budget,
        "accuracy": round(100 * report.after["score"], 3),
        "original": round(100 * report.before["score"], 3),
        "recipe": report.recipe,
        "pace": pace,
        "trials": len(report.trials),
        "seconds": round(time.perf_counter() - start),
    }


def _pace(recipe: Recipe) -> float:
    """The factor on the usual learning rates that a joint recipe trains with."""
    rates = [rate for step in recipe.steps if (rate := getattr(step, "learning_rate", None)) is not None]
    return rates[-1] / Healing(1, 1).last_rate


def _mildest(task: Task, way: str, budget: int, seed: int) -> float | None:
    """The smallest strength whose untrained file fits, or None."""
    low, high = 0.0, 1.0
    if _untrained(task, way, high, seed) > budget:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if _untrained(task, way, middle, seed) <= budget else (middle, high)
    return high


def _untrained(task: Task, way: str, strength: float, seed: int) -> int:
    context = Context(data=task.data, teacher=task.model, seed=seed)
    model, edits = run(steps(way, strength, Healing(0, 0), task.model), task.model, context)
    key = json.dumps(to_json([edit for edit in compact(edits) if not isinstance(edit, Write)]))
    if key not in _GRAPHS:
        _GRAPHS[key] = export_graph(model, task.data)
    return len(package(model, edits, {}, _GRAPHS[key]).to_bytes())


_GRAPHS: dict[str, Graph] = {}


def main() -> None:
    """Run the cells that are missing, and write the rows of the networks that are complete."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--networks", nargs="*", choices=tuple(NETWORKS), default=list(NETWORKS))
    asked.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    asked.add_argument("--budgets", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    asked.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    options = asked.parse_args()
    for name in options.networks:
        network = NETWORKS[name]
        for seed in options.seeds:
            task = opened(network, seed)
            size = structure(task.model, task.data).size_bytes
            for factor in (network.factors[place] for place in options.budgets if place < len(network.factors)):
                for way in options.ways:
                    key = f"{name}, {factor:g}x, {way}, seed {seed}"
                    if key not in kept(NAME):
                        pace = kept(NAME).get(f"{name}, {factor:g}x, joint, seed {seed}", {}).get("pace", 1.0)
                        found = cell(task, way, round(size / factor), seed, network.epochs, pace)
                        keep(NAME, {**kept(NAME), key: found})
                        sys.stdout.write(f"{key}: {found}\n")
                        sys.stdout.flush()
        row(name)
    wins()


def _cells(name: str, factor: float) -> dict[str, list[Cell]]:
    """The cells of a budget by way, those of ways that have as many seeds as joint."""
    found: dict[str, list[Cell]] = {}
    for key, value in kept(NAME).items():
        network, size, rest = key.split(", ", 2)
        if network == name and size == f"{factor:g}x":
            found.setdefault(rest.rpartition(", seed ")[0], []).append(value)
    return found


def _accuracy(cells: list[Cell]) -> float | None:
    """The mean, or None where one could not be so small."""
    if not cells or any(not one.get("met") for one in cells):
        return None
    return statistics.mean(one["accuracy"] for one in cells)


def _margins(name: str) -> dict[str, tuple[float, str, int]]:
    """For each complete budget, joint minus the best other way, that way, and the seeds."""
    found = {}
    for factor in NETWORKS[name].factors:
        cells = _cells(name, factor)
        seeds = len(cells.get("joint", []))
        if not seeds or any(len(cells.get(way, [])) != seeds for way in WAYS):
            continue
        scores = {way: _accuracy(own) for way, own in cells.items()}
        others = {way: score for way, score in scores.items() if way != "joint" and score is not None}
        joint = scores["joint"]
        if joint is not None and others:
            best = max(others, key=lambda way: others[way])
            found[f"{factor:g}x"] = (joint - others[best], best, seeds)
    return found


def row(name: str) -> None:
    """Write the row of a network whose budgets are all done."""
    margins = _margins(name)
    if not margins:
        return
    told = "; ".join(f"{size}: {margin:+.2f} over {best}" for size, (margin, best, _) in margins.items())
    whole = len(margins) == len(NETWORKS[name].factors)
    got = round(min(margin for margin, _, _ in margins.values()), 2) if whole else None
    note = f"test accuracy of joint minus the best other way, points, by budget: {told}"
    note = note if whole else f"{len(margins)} of {len(NETWORKS[name].factors)} budgets are done: {note}"
    details = {key: value for key, value in kept(NAME).items() if key.startswith(f"{name}, ")}
    record(NAME, f"budget.{name}.margin", got, min(seeds for *_, seeds in margins.values()), note, details)


def wins() -> None:
    """Write the share of budgets that joint wins strictly, over the networks that have any."""
    margins = {(name, size): found for name in NETWORKS for size, found in _margins(name).items()}
    if not margins:
        return
    strict = [
        f"{name} {size} by {margin:+.2f} points" for (name, size), (margin, *_) in margins.items() if margin >= EDGE
    ]
    for (name, size), (margin, best, _) in margins.items():
        share = None if margin >= EDGE else _smaller(name, float(size[:-1]), best)
        if share is not None:
            strict.append(f"{name} {size} by {share:.2f} of the bytes at no less accuracy")
    note = (
        f"{len(strict)} of {len(margins)} budgets at least {EDGE} points better than the best other way, or, where it is not, with a joint "
        f"network of a smaller budget that is as accurate and takes at most {SMALLER} of its bytes: {', '.join(strict) or 'none'}"
    )
    seeds = min(seeds for *_, seeds in margins.values())
    record(NAME, "budget.strict_wins", round(len(strict) / len(margins), 2), seeds, note)


def _smaller(name: str, factor: float, best: str) -> float | None:
    """The bytes of the smallest joint network as accurate as the best other way at a budget, over that way's; None if not strict."""
    other = _cells(name, factor)[best]
    wanted, size = _accuracy(other), statistics.mean(one["bytes"] for one in other)
    shares = []
    for own in NETWORKS[name].factors:
        joint = _cells(name, own).get("joint", [])
        reached = _accuracy(joint) if len(joint) == len(other) else None
        if reached is not None and wanted is not None and reached >= wanted:
            shares.append(statistics.mean(one["bytes"] for one in joint) / size)
    return min(shares) if min(shares, default=1.0) <= SMALLER else None


def _say(message: str, share: float) -> None:
    if "epoch" not in message and "damage" not in message:
        sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
