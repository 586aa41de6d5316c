"""Trials whose result is known and which only take time: what the benchmarks of the search engine run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.budget import Budget
from featherweight.study import Plan
from featherweight.technique import Recipe
from featherweight.techniques import PruneWeights, QuantizeWeights
from featherweight.trials import Assignment

if TYPE_CHECKING:
    import optuna


def plan(trials: int, generation: int = 8) -> Plan:
    """Return a search that trains every trial once."""
    original = {"size": 1000.0, "score": 1.0}
    return Plan(
        Budget.parse("size<=10%, drop<=30pt"),
        original,
        ("size", "drop"),
        trials=trials,
        generation=generation,
        rungs=(1.0,),
    )


def space(trial: optuna.Trial) -> Recipe:
    """Draw two strengths; no two draws are equal."""
    ratio = trial.suggest_float("ratio", 0.0, 0.95) + trial.number * 1e-9
    return PruneWeights(ratio=ratio) + QuantizeWeights(bits=trial.suggest_int("bits", 2, 8))


class Sleeping:
    """A trial that sleeps, leaves a line in a file when it ends, and gives what a formula says."""

    def __init__(self, seconds: float, folder: Path) -> None:
        self.seconds, self.folder = seconds, folder

    def __call__(self, assignment: Assignment) -> dict[str, Any]:
        """Return the values of a made-up model."""
        time.sleep(self.seconds)
        sparse, coded = (
            next(iter(step.values())) if isinstance(step, dict) else {} for step in assignment.recipe["steps"]
        )
        ratio, bits = sparse.get("ratio", 0.9), coded.get("bits", 4)
        drop = ratio**4 + 2.0**-bits
        line = f"{assignment.number}\n".encode()
        file = os.open(self.folder / "ended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line)
        os.close(file)
        return {"values": {"size": 1000 * (1 - ratio) * bits / 32, "drop": drop, "drop_bound": drop}, "idle": []}


def ended(folder: Path) -> list[int]:
    """Return the numbers of the trials that ended, in order, as often as they did."""
    path = folder / "ended"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
