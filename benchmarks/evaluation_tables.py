"""Which technique, for four networks: every recipe at four budgets under three seeds, by `featherweight.compare`'s rules.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/evaluation_tables.py mlp [lstm resnet20 minilm] [--seeds 1] [--no-joint]

Cells lie in the benchmarks' cache and are never run twice: a sitting may be killed at any time, and `--seeds 1` completes one seed
everywhere before the second. Tables and pages go to `benchmarks/results/comparisons/`; a network counts once all its cells are done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import letters
from originals import cache
from results import FOLDER, keep, kept, record

from featherweight import Task, compare
from featherweight.report.compared import Comparison
from featherweight.report.fronts import pareto

NAME = "evaluation_tables"
BUDGETS = ("4x", "8x", "16x", "32x")
SEEDS = 3
RECIPES = ("channels", "low_rank", "sparse", "bits", "rate_distortion", "channels_bits", "sparse_bits", "joint")


def _lstm(seed: int) -> Task:
    import speech

    return speech.task(seed)


def _resnet20(seed: int) -> Task:
    import cifar

    return cifar.task("resnet20", seed)


def _minilm(seed: int) -> Task:
    import sentiment

    return sentiment.task(seed)


class Network(NamedTuple):
    """What is compared: an original for each seed, and how many epochs each recipe may train."""

    task: Callable[[int], Task]
    epochs: int


NETWORKS = {
    "mlp": Network(letters.task, 6),
    "lstm": Network(_lstm, 6),
    "resnet20": Network(_resnet20, 2),
    "minilm": Network(_minilm, 2),
}


def compared(name: str, seeds: int, recipes: tuple[str, ...] = RECIPES) -> Comparison:
    """Run what is missing of a network's table, and copy table and page to the results."""
    network, folder = NETWORKS[name], cache() / f"compare-{name}"
    command = f"python benchmarks/evaluation_tables.py {name}"
    found = compare(
        network.task,
        recipes,
        BUDGETS,
        out=folder,
        seeds=seeds,
        epochs=network.epochs,
        name=name,
        command=command,
        progress=_say,
    )
    shown = FOLDER / "comparisons" / name
    shown.mkdir(parents=True, exist_ok=True)
    for file in ("results.csv", "report.html"):
        shutil.copy(folder / file, shown / file)
    return found


def on_front(found: Comparison) -> dict[str, Any]:
    """Return at which budgets the joint search is below the front of all others.

    It is where another recipe, in a file that is not larger, lost less than the low end of the 95 % interval of what the joint search
    lost against the original; what lies within that interval is called level.
    """
    others = [row for row in found.ranking if row["recipe"] != "joint" and row["met"]]
    higher = found.originals[0]["higher_is_better"]
    beaten = []
    for row in (row for row in found.ranking if row["recipe"] == "joint"):
        smaller = [other for other in others if other["bytes"] <= row["bytes"]]
        best = pareto(smaller, "bytes", higher)[-1:]
        if best and best[0]["drop"] < row["drop_low"]:
            beaten.append(f"{row['budget']}: {best[0]['recipe']} {best[0]['score']:.4f} against {row['score']:.4f}")
    return {"points": sum(row["recipe"] == "joint" for row in found.ranking), "beaten": beaten}


def main() -> None:
    """Run the named networks, and write the rows over all that are complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--no-joint", action="store_true", help="leave the joint search for another sitting")
    asked = parser.parse_args()
    recipes = tuple(name for name in RECIPES if not (asked.no_joint and name == "joint"))
    for name in asked.networks:
        found = compared(name, asked.seeds, recipes)
        done = kept(NAME)
        done[name] = {
            "seeds": asked.seeds,
            "cells": len(found.rows),
            "files": len(found.done()),
            "recipes": len(found.contenders),
            "answers": [answer["text"] for answer in found.answers],
            "joint": on_front(found),
        }
        keep(NAME, done)
    _rows(kept(NAME))


def _rows(done: dict[str, Any]) -> None:
    whole = {name: row for name, row in done.items() if row["seeds"] >= SEEDS and row["joint"]["points"]}
    told = "; ".join(
        f"{name}: {row['recipes']} recipes, {row['cells']} cells, {row['files']} files. {' '.join(row['answers'])}"
        for name, row in whole.items()
    )
    least = min((row["seeds"] for row in whole.values()), default=0)
    record(NAME, "evaluation.tables", len(whole), least, told or "no table is complete yet", done)
    on = [name for name, row in whole.items() if row["joint"]["points"] and not row["joint"]["beaten"]]
    beaten = "; ".join(
        f"{name} {', '.join(row['joint']['beaten'])}" for name, row in whole.items() if row["joint"]["beaten"]
    )
    note = f"on or above the front of all others at every budget: {', '.join(on) or 'none'}" + (
        f"; beaten: {beaten}" if beaten else ""
    )
    record(NAME, "evaluation.joint_on_front", len(on), least, note)


def _say(message: str, share: float) -> None:
    if ": epoch" not in message:
        sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
