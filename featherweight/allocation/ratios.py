"""How much is enough: the mildest ratio of a technique that meets a budget, and one ratio spread over several steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.artifact import package
from featherweight.budget import Budget
from featherweight.data import SPLITS, Data, complete
from featherweight.edits import Edit, to_json
from featherweight.errors import BudgetError, RecipeError
from featherweight.latency_table import LatencyTable
from featherweight.measurement import peak_bytes, structure
from featherweight.portable import Graph, assemble, export_graph
from featherweight.running import Outcome, run
from featherweight.scoping import Only
from featherweight.technique import Context, Recipe, Stage, Technique

_GRID = 1000  # ratios are tried in thousandths: ten halvings, and a recipe that reads well


def allocate(
    technique: Technique,
    model: nn.Module,
    data: Data,
    budget: Budget | str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    teacher: nn.Module | None = None,
    latency_table: Path | None = None,
    progress: Callable[[str, float], None] = lambda message, done: None,
) -> Technique:
    """Return the technique with the smallest ratio, in thousandths, whose model meets a budget; nothing is scored.

    The ratio is bisected: about ten trials carry the technique out on private copies and measure what comes out.
    Multiply-adds, parameters and bytes are the same at every call. Latency is that of ONNX Runtime on one thread, timed in
    turn with the original, and repeatable where `latency_table` already has it.

    Args:
        technique: a step, one narrowed by `only`, or a recipe, with exactly one `ratio` in it; leave training out.
        model: the trained model; it is not changed.
        data: gives the example, and calibration data to a technique that needs it.
        budget: limits such as `"macs<=40%"`, `"params<=100k"`, `"latency<=2x, memory<=64MiB"`; relative to `model`.
        seed: of the technique's random draws.
        device: where the technique works.
        teacher: the original, where `model` is compressed already; `model` itself when missing.
        latency_table: JSON file of measured seconds to read and extend.
        progress: called with a message and the share done.

    Raises:
        BudgetError: the budget limits the drop, which only training and scoring can tell, or the largest ratio does not meet
            it; the message has the closest values.
        RecipeError: the technique has no ratio, or several, or needs data that is missing.
    """
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    if wanted.limit("drop") is not None:
        raise BudgetError(f"{wanted}: a drop is known after healing only; limit costs here, or use compress")
    ratios = [f for step in technique.steps for f in dataclasses.fields(_bare(step)) if f.name == "ratio"]
    if len(ratios) != 1:
        raise RecipeError(
            f"{technique} has {len(ratios)} ratios to choose; it must have exactly one, as prune_channels"
        )
    if any(getattr(data, split) is not None for split in SPLITS):
        data, _ = complete(data)
    taught = copy.deepcopy(model if teacher is None else teacher).to(device).eval()
    costs = _Costs(model, data, wanted, LatencyTable(latency_table))
    allowed = {limit.metric: limit.allowed(costs.original[limit.metric]) for limit in wanted.limits}
    trials: dict[int, dict[str, float]] = {}
    memory: dict[Any, Any] = {}

    def meets(step: int) -> bool:
        context = Context(data=data, teacher=taught, device=torch.device(device), seed=seed, memory=memory)
        trials[step] = costs.of(run(_with_ratio(technique, step / _GRID), model, context))
        told = ", ".join(f"{name} {value:,.6g}" for name, value in trials[step].items())
        progress(f"allocating: ratio {step / _GRID:g}: {told}", min(1.0, len(trials) / _GRID.bit_length()))
        return all(trials[step][name] <= most for name, most in allowed.items())

    low, high = math.ceil(ratios[0].metadata["low"] * _GRID), math.floor(ratios[0].metadata["high"] * _GRID)
    if meets(low):
        return _with_ratio(technique, low / _GRID)
    if not meets(high):
        over = [
            f"{limit} allows {allowed[limit.metric]:,.6g} and the closest is {trials[high][limit.metric]:,.6g}"
            for limit in wanted.limits
            if trials[high][limit.metric] > allowed[limit.metric]
        ]
        raise BudgetError(f"{technique} misses the budget even at ratio {high / _GRID:g}: {'; '.join(over)}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return _with_ratio(technique, high / _GRID)


def gradually(technique: Technique, steps: int, heal: Technique) -> Recipe:
    """Return a recipe that reaches a technique's ratio in several steps, each followed by healing.

    A technique that removes takes the share `1 - (1 - ratio)^(1 / steps)` of what is left at each step; one that sets to
    zero counts all weights, and goes to `1 - (1 - ratio)^(i / steps)` at step `i`.

    Args:
        technique: a step, or one narrowed by `only`, with a `ratio`.
        steps: how many, at least 1.
        heal: what follows each of them, such as `Distill(epochs=2)`.

    Raises:
        RecipeError: the technique has no ratio, or `steps` is no positive number.
    """
    inner = _bare(technique)
    ratio = getattr(inner, "ratio", None)
    if not isinstance(ratio, float):
        raise RecipeError(f"{technique} has no ratio to reach gradually; prune_channels and prune_weights have one")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RecipeError(f"gradually: steps={steps!r} must be a whole number of at least 1")
    removes = technique.stage is Stage.CUT
    shares = [1 - (1 - ratio) ** ((1 if removes else index) / steps) for index in range(1, steps + 1)]
    return Recipe(tuple(part for share in shares for part in (_with_ratio(technique, share), heal)))


class _Costs:
    """What a budget's limits look at, of the original and of a candidate."""

    def __init__(self, model: nn.Module, data: Data, budget: Budget, table: LatencyTable) -> None:
        self.data, self.table = data, table
        self.metrics = {limit.metric for limit in budget.limits}
        self._whole = b""
        self._graphs: dict[str, Graph] = {}
        if self.metrics & {"latency", "memory"}:
            self._whole = assemble(export_graph(model, data), model.state_dict())
        self.original = self._counts(model)
        self.original["size"] = float(structure(model, data).size_bytes)
        if "latency" in self.metrics:
            self.original["latency"] = table.original(self._whole, data)
        if "memory" in self.metrics:
            self.original["memory"] = float(peak_bytes(self._whole, data))

    def _counts(self, model: nn.Module) -> dict[str, float]:
        counted = structure(model, self.data)
        return {"params": float(counted.params), "macs": float(counted.macs or 0)}

    def of(self, outcome: Outcome) -> dict[str, float]:
        """Return the candidate's costs by metric, those that the budget limits."""
        model = outcome.model.cpu()
        found = self._counts(model)
        if self.metrics & {"size", "latency", "memory"}:
            graph = self._graph(model, outcome.edits)
            whole = assemble(graph, model.state_dict())
            if "size" in self.metrics:
                found["size"] = float(len(package(model, outcome.edits, {}, graph).to_bytes()))
            if "latency" in self.metrics:
                found["latency"] = self.table.candidate(whole, self._whole, self.data)
            if "memory" in self.metrics:
                found["memory"] = float(peak_bytes(whole, self.data))
        return {name: value for name, value in found.items() if name in self.metrics}

    def _graph(self, model: nn.Module, edits: list[Edit]) -> Graph:
        """The model's graph, which holds no weights: the same for candidates of the same structure."""
        key = json.dumps(to_json(edits))
        if key not in self._graphs:
            self._graphs[key] = export_graph(model, self.data)
        return self._graphs[key]


def _bare(technique: Technique) -> Any:
    """The step inside every `only` around it."""
    while isinstance(technique, Only):
        technique = technique.inner
    return technique


def _with_ratio(technique: Technique, ratio: float) -> Technique:
    """Return the technique with this ratio in the step that has one."""
    if isinstance(technique, Only):
        return dataclasses.replace(technique, inner=_with_ratio(technique.inner, ratio))
    if isinstance(technique, Recipe):
        return dataclasses.replace(technique, parts=tuple(_with_ratio(part, ratio) for part in technique.parts))
    has = any(f.name == "ratio" for f in dataclasses.fields(technique))
    return dataclasses.replace(technique, **{"ratio": ratio}) if has else technique
