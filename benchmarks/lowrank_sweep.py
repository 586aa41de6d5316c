"""Rank sweep: accuracy before and after healing against file bytes: plain, whitened, Fisher-weighted and Tucker-2 factors, ranks spread.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/lowrank_sweep.py [resnet20 | resnet56 | vgg19 | lstm | minilm ...]
        [--forms plain whitened ...] [--ratios 0.5 ...]

With names, forms or ratios, prints their points and records nothing. Each point is kept, so a killed run goes on, and several may run
side by side. All forms of a network lose the same share of the parameters of each layer, but for the one that gives the outputs and
for ranks that are spread over the layers; a file holds them as float32. All heal alike, with the original as teacher.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import shutil
import statistics
import sys
from typing import Any

import torch
from originals import cache, device, trainer
from results import keep, kept, record

from featherweight import Context, Recipe, Task, run
from featherweight.artifact import package
from featherweight.data import Shortened
from featherweight.portable import export_graph
from featherweight.scoring import evaluate
from featherweight.technique import Technique
from featherweight.techniques import Distill, FactorRecurrent, FoldBatchNorm, LowRank

NAME = "lowrank_sweep"
NETWORKS = ("resnet56", "vgg19", "lstm", "minilm")
RATIOS = (0.2, 0.35, 0.5, 0.65, 0.8)
PAIRS = (("plain", "whitened"), ("plain tucker", "whitened tucker"))
SPREAD = "spread"
HEALED_ON = 100  # batches of images, of 128 each
HEALS = {
    "resnet56": Distill(epochs=1, learning_rate=1e-3),
    "vgg19": Distill(epochs=1, learning_rate=2e-4),
    "lstm": Distill(epochs=3, learning_rate=1e-3),
    "minilm": Distill(epochs=1, learning_rate=1e-4),
    "resnet20": Distill(epochs=1, learning_rate=1e-3),
}


def task(name: str) -> Task:
    """Return a baseline and its data; what it imports is needed for that network alone."""
    if name == "lstm":
        import speech

        return speech.task()
    if name == "minilm":
        import sentiment

        return sentiment.task()
    import cifar

    made = cifar.judged(name) if name == "vgg19" else cifar.task(name)
    return dataclasses.replace(made, data=dataclasses.replace(made.data, train=Shortened(made.data.train, HEALED_ON)))


def forms(name: str, ratio: float) -> dict[str, Technique]:
    """Return the forms that a network can take, by name, each without a share `ratio` of its parameters."""
    if name == "lstm":
        return {
            "plain": FactorRecurrent(ratio=ratio, rank="ratio", method="svd", hidden="factors"),
            "whitened": FactorRecurrent(ratio=ratio, rank="ratio", hidden="factors"),
            "whitened shared": FactorRecurrent(ratio=ratio, rank="ratio", hidden="shared"),
            SPREAD: FactorRecurrent(ratio=ratio, rank="spread", hidden="factors"),
        }
    found: dict[str, Technique] = {
        "plain": LowRank(ratio=ratio, rank="ratio"),
        "whitened": LowRank(ratio=ratio, rank="ratio", method="whitened"),
        "fisher": LowRank(ratio=ratio, rank="ratio", method="fisher"),
        SPREAD: LowRank(ratio=ratio, rank="spread", method="fisher", shape="auto"),
    }
    if name != "minilm":
        found["plain tucker"] = LowRank(ratio=ratio, rank="ratio", shape="tucker")
        found["whitened tucker"] = LowRank(ratio=ratio, rank="ratio", method="whitened", shape="tucker")
    return found


def measured(made: Task, technique: Technique | None, heal: Distill | None, key: str) -> dict[str, float]:
    """Return bytes of the file of one form, or of the network as it is, norms folded, and test accuracy before and after healing."""
    steps = (FoldBatchNorm(),) if technique is None else (FoldBatchNorm(), technique)
    teacher, place = copy.deepcopy(made.model).to(device()), cache() / NAME / key.replace(" ", "_")
    context = Context(made.data, teacher, device(), workspace=place, report=_say)
    small, edits = run(Recipe(steps), made.model, context)
    plain = copy.deepcopy(small).cpu()
    found = {
        "accuracy": evaluate(small, made.data, "test", device()).value,
        "bytes": len(package(plain, edits, {}, export_graph(plain, made.data)).to_bytes()),
    }
    if technique is not None and heal is not None:
        found["healed"] = evaluate(run(heal, small, context).model, made.data, "test", device()).value
        shutil.rmtree(place, ignore_errors=True)
    return found


def sweep(name: str, some: list[str] | None, ratios: list[float]) -> None:
    """Measure what is missing of one network's forms, some or all, at some ratios; the network is made if anything is."""
    made: Task | None = None
    wanted: dict[str, Technique | None] = {f"{name} dense": None}
    for ratio in ratios:
        wanted |= {
            f"{name} {form} {ratio}": how for form, how in forms(name, ratio).items() if not some or form in some
        }
    for key, technique in wanted.items():
        if key not in kept(NAME):
            made = made or task(name)
            point = measured(made, technique, HEALS[name], key)
            keep(NAME, {**kept(NAME), key: point})
        done = kept(NAME)
        sys.stdout.write(
            f"{key:32} {done[key]['bytes']:>10,} bytes {100 * done[key]['accuracy']:6.2f} %, "
            f"healed {100 * done[key].get('healed', float('nan')):6.2f} %\n"
        )
        sys.stdout.flush()


def differences(done: dict[str, Any]) -> dict[str, float]:
    """Return, in points, what whitened factors have over plain ones of the same form, network and ratio."""
    found = {}
    for name in NETWORKS:
        for ratio in RATIOS:
            for plain, whitened in PAIRS:
                before, after = done.get(f"{name} {plain} {ratio}"), done.get(f"{name} {whitened} {ratio}")
                if before and after:
                    found[f"{name} {whitened} {ratio}"] = round(100 * (after["accuracy"] - before["accuracy"]), 2)
    return found


def advantages(done: dict[str, Any]) -> dict[str, float]:
    """Return, in points, what spread ranks have over the best of the same share everywhere, both healed, by network and ratio."""
    found = {}
    for name in NETWORKS:
        for ratio in RATIOS:
            healed = {form: done.get(f"{name} {form} {ratio}", {}).get("healed") for form in forms(name, ratio)}
            uniform = [value for form, value in healed.items() if form != SPREAD and value is not None]
            if healed[SPREAD] is not None and uniform:
                found[f"{name} {ratio}"] = round(100 * (healed[SPREAD] - max(uniform)), 2)
    return found


def larger(done: dict[str, Any]) -> float:
    """Return by what share the largest of the spread files is larger than the plain one of its network and ratio."""
    shares = [
        done[f"{name} {SPREAD} {ratio}"]["bytes"] / done[f"{name} plain {ratio}"]["bytes"] - 1
        for name in NETWORKS
        for ratio in RATIOS
    ]
    return max(shares)


def main() -> None:
    """Measure every network, or those named; write the rows when it is all of them."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("networks", nargs="*", default=list(NETWORKS))
    asked.add_argument("--forms", nargs="*", help="these alone; no rows are then written")
    asked.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    options = asked.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        sweep(name, options.forms, options.ratios)
    if options.forms or set(options.networks) != set(NETWORKS) or set(options.ratios) != set(RATIOS):
        return
    done = kept(NAME)
    found = differences(done)
    worst = min(found, key=found.__getitem__)
    note = (
        f"smallest of {len(found)} differences, at {worst}; {', '.join(NETWORKS)}, test accuracy before healing, shares of "
        f"{', '.join(map(str, RATIOS))} of the parameters removed; a whitened file is at most a bias a layer larger"
    )
    record(NAME, "lowrank.whitened_over_plain", found[worst], 1, note, done)
    found, more = advantages(done), larger(done)
    worst = min(found, key=found.__getitem__)
    note = (
        f"smallest of {len(found)} differences, at {worst}, mean {statistics.mean(found.values()):+.2f}; test accuracy after healing "
        f"alike, on {trainer()}, with images {HEALED_ON} batches of them: {'; '.join(f'{name} {HEALS[name]}' for name in NETWORKS)}; "
        "ranks spread by allocation over the layers, against the best of all forms that lose the same share of every layer; "
        f"its files are up to {more:.1%} larger, because equal shares round the rank of every layer down"
    )
    record(NAME, "lowrank.allocated_over_uniform", found[worst], 1, note, found)


def _say(message: str, _: float) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
