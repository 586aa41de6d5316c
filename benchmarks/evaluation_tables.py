"""Which technique, for four networks: every recipe at four budgets under three seeds, by `featherweight.compare`'s rules.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/evaluation_tables.py mlp [lstm resnet20 minilm] [--seeds 1]
        [--budgets 8x] [--recipes bits joint] [--workers 2]

Cells lie in the benchmarks' cache and are never run twice: a sitting may be killed at any time, and `--seeds 1` completes one seed
everywhere before the second. Tables and pages go to `benchmarks/results/comparisons/` once all budgets and recipes are asked for, and
with them the cells until all seeds are done, so that another machine goes on; a network counts once all its cells are done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import letters
import numpy as np
import torch
from originals import cache
from results import FOLDER, keep, kept, record

from featherweight import Task, compare
from featherweight.comparison.cells import Cell
from featherweight.comparison.contenders import chosen
from featherweight.report.compared import Comparison
from featherweight.significance import bootstrap
from featherweight.workers.hiring import Crew

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
    "lstm": Network(_lstm, 3),
    "resnet20": Network(_resnet20, 2),
    "minilm": Network(_minilm, 2),
}


def compared(name: str, seeds: int, recipes: Sequence[str], budgets: Sequence[str], workers: int) -> Comparison:
    """Run what is missing of a network's table."""
    network, folder = NETWORKS[name], cache() / f"compare-{name}"
    if (committed := FOLDER / "comparisons" / name / "cells").exists():
        _copied(committed, folder / "cells")
    command = f"python benchmarks/evaluation_tables.py {name}"
    return compare(
        network.task,
        recipes,
        budgets,
        out=folder,
        seeds=seeds,
        epochs=network.epochs,
        name=name,
        command=command,
        crew=Crew(workers),
        progress=_say,
    )


def shown(name: str, whole: bool) -> None:
    """Copy table and page of a network to the results, and its cells where they are not the whole yet."""
    here, there = cache() / f"compare-{name}", FOLDER / "comparisons" / name
    there.mkdir(parents=True, exist_ok=True)
    for file in ("results.csv", "report.html"):
        shutil.copy(here / file, there / file)
    shutil.rmtree(there / "cells", ignore_errors=True)
    if not whole:
        _copied(here / "cells", there / "cells")


def _copied(cells: Path, to: Path) -> None:
    """Copy facts and scores of cells that are not there, compressed models apart."""
    to.mkdir(parents=True, exist_ok=True)
    for file in cells.iterdir():
        if file.suffix in (".json", ".npz", ".npy", ".yaml") and not (to / file.name).exists():
            shutil.copy(file, to / file.name)


def on_front(found: Comparison, folder: Path) -> dict[str, Any]:
    """Return at which budgets the joint search is below the front of all others.

    It is where another recipe's file that is not larger is better on the same test samples: the 95 % interval of the mean paired
    difference, seeds and samples drawn again, lies above zero. That is how the table itself tells who is as good as the best. The
    interval of either one's loss against the original would not do: a faithful copy of the original has none.
    """
    contenders = {one.name: one for one in chosen(RECIPES)}

    def samples(row: Mapping[str, Any], seeds: Sequence[int]) -> torch.Tensor:
        cells = [Cell(contenders[row["recipe"]], row["budget"], seed, folder) for seed in seeds]
        return torch.from_numpy(np.stack([cell.samples() for cell in cells])).double()

    sign = 1 if found.originals[0]["higher_is_better"] else -1
    others = [row for row in found.ranking if row["recipe"] != "joint" and row["met"]]
    beaten, level = [], []
    for row in (row for row in found.ranking if row["recipe"] == "joint"):
        for other in (other for other in others if other["bytes"] <= row["bytes"] and other["drop"] < row["drop"]):
            shared = sorted(set(row["seeds"]) & set(other["seeds"]))
            low, high = bootstrap(sign * (samples(other, shared) - samples(row, shared)))
            told = (
                f"{row['budget']}: {other['recipe']} of {other['budget']} {other['score']:.4f} against {row['score']:.4f} "
                f"({low:+.4f} to {high:+.4f})"
            )
            (beaten if low > 0 else level).append(told)
    return {"points": sum(row["recipe"] == "joint" for row in found.ranking), "beaten": beaten, "level": level}


def main() -> None:
    """Run the named networks, and write the rows over all that are complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--budgets", nargs="*", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    asked = parser.parse_args()
    for name in asked.networks:
        found = compared(name, asked.seeds, asked.recipes, asked.budgets, asked.workers)
        if set(asked.budgets) != set(BUDGETS) or set(asked.recipes) != set(RECIPES):
            continue
        shown(name, whole=asked.seeds >= SEEDS)
        done = kept(NAME)
        done[name] = {
            "seeds": asked.seeds,
            "cells": len(found.rows),
            "files": len(found.done()),
            "recipes": len(found.contenders),
            "answers": [answer["text"] for answer in found.answers],
            "joint": on_front(found, cache() / f"compare-{name}"),
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
    note = (
        "on or above the front of all others at every budget, by the 95 % interval of the paired difference from each file that is not "
        f"larger: {', '.join(on) or 'none'}"
    )
    for what, about in (("beaten", "beaten"), ("level", "others that score better by no more than chance")):
        found = [f"{name} {', '.join(row['joint'][what])}" for name, row in whole.items() if row["joint"].get(what)]
        note += f"; {about}: {'; '.join(found)}" if found else ""
    if older := [name for name, row in whole.items() if "level" not in row["joint"]]:
        note += (
            f"; {', '.join(older)} by an older rule: another's mean loss against the interval of the joint search's own"
        )
    record(NAME, "evaluation.joint_on_front", len(on), least, note)


def _say(message: str, share: float) -> None:
    if ": epoch" not in message:
        sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
