"""One trial of a search: a recipe carried out on a private copy, its costs taken and its score on validation data."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.artifact import package
from featherweight.data import Task
from featherweight.edits import Edit
from featherweight.errors import RecipeError
from featherweight.job import MARGIN
from featherweight.latency import one_thread
from featherweight.latency_table import LatencyTable
from featherweight.measurement import peak_bytes, structure
from featherweight.modes import answering
from featherweight.portable import assemble, export_graph
from featherweight.preflight import opened
from featherweight.recipe_files import recipe_from_json
from featherweight.running import run
from featherweight.scoping import Only
from featherweight.scoring import evaluate
from featherweight.tasks import find_task
from featherweight.technique import Context, Recipe, Technique

_FACTS = 240  # bytes that the scores and other facts take in the manifest of the final file


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do.

    Attributes:
        number: of the trial.
        rung: of the ladder of training lengths, 0 is the shortest.
        share: of the whole training, above 0 to 1.
        recipe: JSON-able, as `Recipe.to_json` gives it.
    """

    number: int
    rung: int
    share: float
    recipe: Any


Measure = Callable[[Assignment], dict[str, Any]]
"""Carries a trial out and returns `values`, numbers by name, and whatever else is to be kept, JSON-able."""


def shortened(technique: Technique, share: float) -> Technique:
    """Return a technique that trains for a share of its epochs, at least one where it had any."""
    if isinstance(technique, Recipe):
        return dataclasses.replace(technique, parts=tuple(shortened(part, share) for part in technique.parts))
    if isinstance(technique, Only):
        return dataclasses.replace(technique, inner=shortened(technique.inner, share))
    epochs = getattr(technique, "epochs", 0)
    return dataclasses.replace(technique, **{"epochs": max(1, round(share * epochs))}) if epochs else technique


def without(recipe: Recipe, idle: Iterable[int]) -> Recipe:
    """Return the recipe without the steps at these positions, which found nothing to do."""
    left_out = set(idle)
    kept = tuple(step for index, step in enumerate(recipe.steps) if index not in left_out)
    return Recipe(kept, recipe.any_order)


class Bench:
    """Where trials run: the original with its data, opened once. Every trial computes on one thread, wherever it runs.

    Attributes:
        original: the original's `size`, `params`, `macs` and `score`, and `latency` and `memory` where they are asked for.
    """

    def __init__(
        self,
        task: Task | str,
        metrics: Iterable[str] = (),
        *,
        seed: int = 0,
        device: str = "cpu",
        workspace: Path | None = None,
        original: Mapping[str, float] | None = None,
    ) -> None:
        """Open a task and measure its model.

        Args:
            task: the task, or its name as `find_task` takes it.
            metrics: which of `"latency"` and `"memory"` are to be measured too.
            seed: of every random draw of a trial.
            device: where trials train.
            workspace: folder for the checkpoints of unfinished trials; None keeps none.
            original: what another bench measured, so that all tell milliseconds relative to the same.

        Raises:
            DataError, ModelError, RecipeError: as `find_task` and `opened`.
        """
        found = find_task(task) if isinstance(task, str) else task
        self.seed, self.device, self.workspace = seed, torch.device(device), workspace
        self.metrics = frozenset(metrics)
        with one_thread():
            self.model, self.data, _ = opened(found.model, found.data)
            self.teacher = answering(self.model, self.device)
            self.score = evaluate(self.model, self.data, "validate")
            self.whole = assemble(export_graph(self.model, self.data), self.model.state_dict())
            self.table = LatencyTable(None)
            if original is not None and "latency" in original:
                self.table.seconds["original"] = original["latency"]
            self.original = dict(original) if original is not None else self._measured()

    def _measured(self) -> dict[str, float]:
        counted = structure(self.model, self.data)
        found = {"size": counted.size_bytes, "params": counted.params, "macs": counted.macs or 0}
        values = {**{key: float(value) for key, value in found.items()}, "score": self.score.value}
        if "latency" in self.metrics:
            values["latency"] = self.table.original(self.whole, self.data)
        if "memory" in self.metrics:
            values["memory"] = float(peak_bytes(self.whole, self.data))
        return values

    def __call__(self, assignment: Assignment) -> dict[str, Any]:
        """Return `values` of a trial, and `idle`, the positions of the steps that found nothing to do.

        Raises:
            FeatherweightError: the recipe does not work on this model.
        """
        recipe = shortened(recipe_from_json(assignment.recipe), assignment.share)
        folder = self.workspace / f"{assignment.number}-{assignment.rung}" if self.workspace is not None else None
        with one_thread():
            model, edits, idle = self._carry_out(recipe, folder)
            values = self._values(model, edits, recipe)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return {"values": values, "idle": idle}

    def _carry_out(self, recipe: Technique, folder: Path | None) -> tuple[nn.Module, list[Edit], list[int]]:
        for split in sorted(recipe.needs):
            if getattr(self.data, split) is None:
                raise RecipeError(f"{recipe} needs Data({split}=...), which is missing")
        context = Context(self.data, self.teacher, self.device, self.seed, workspace=folder)
        model: nn.Module = copy.deepcopy(self.model)
        edits: list[Edit] = []
        idle: list[int] = []
        for index, step in enumerate(recipe.steps):
            # draws depend on the position, and the final recipe has no idle steps
            context.step, context.position = str(step), index - len(idle)
            model, done = run(step, model, context)
            edits += done
            idle += [] if done else [index]
        return model, edits, idle

    def _values(self, model: nn.Module, edits: list[Edit], recipe: Technique) -> dict[str, float]:
        score = evaluate(model, self.data, "validate", self.device)
        model = model.cpu()
        counted, graph = structure(model, self.data), export_graph(model, self.data)
        size = len(package(model, edits, {"recipe": recipe.to_json()}, graph).to_bytes()) + _FACTS
        drop, error = self.score.drop(score), self.score.drop_error(score)
        values = {
            "size": float(size),
            "params": float(counted.params),
            "macs": float(counted.macs or 0),
            "score": score.value,
            "drop": drop,
            "drop_bound": drop + (MARGIN * error if math.isfinite(error) else 0.0),
        }
        whole = assemble(graph, model.state_dict()) if self.metrics else b""
        if "latency" in self.metrics:
            values["latency"] = self.table.candidate(whole, self.whole, self.data)
        if "memory" in self.metrics:
            values["memory"] = float(peak_bytes(whole, self.data))
        return values
