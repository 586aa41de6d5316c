"""One cell of a comparison: a contender at a budget under a seed, carried out, measured beside the original, kept on disk."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight import measurement as measuring
from featherweight.artifact import Artifact, load, package
from featherweight.budget import Budget
from featherweight.comparison.contenders import Contender
from featherweight.comparison.energy import joules
from featherweight.comparison.judging import Answers, answers, beside
from featherweight.comparison.layers import by_layer, sensitivities
from featherweight.comparison.scaling import Scale, scaled, with_epochs, with_rate
from featherweight.data import Task, example_inputs
from featherweight.errors import FeatherweightError, RecipeError
from featherweight.latency import latencies
from featherweight.mixes import EVERY
from featherweight.pipeline import compress
from featherweight.portable import assemble
from featherweight.preflight import opened
from featherweight.recipe_files import recipe_from_json, recipe_to_yaml
from featherweight.running import Outcome, run
from featherweight.runtimes.onnxruntime import Session
from featherweight.scoring import Score, evaluate
from featherweight.technique import Context, Recipe

RATES = (1.0, 1 / 3, 3.0)  # of the learning rates as written, in the order in which they are tried
_SECONDS = 0.4  # of timing each of two models


@dataclass(frozen=True)
class Rules:
    """What every contender gets alike.

    Attributes:
        epochs: of training, all steps of a recipe together.
        tries: how many learning rates each trains with; the best on validation data counts.
        device: where training runs.
        watts: what a busy core is stated to take, where no counter can be read.
        task: as the command line names it, for the commands that reproduce a row.
    """

    epochs: int
    tries: int
    device: str
    watts: float
    task: str


class Ground:
    """One original with its data: all that the cells of one seed share."""

    def __init__(self, task: Task, seed: int) -> None:
        model, self.data, self.notes = opened(task.model, task.data)
        self.model, self.seed = model.eval(), seed
        self.facts = measuring.structure(self.model, self.data)
        self.scale = Scale(self.model, self.data, seed)
        self.whole = assemble(self.scale.graph(self.model, []), self.model.state_dict())
        self.answers = answers(Session(self.whole).run, self.model, self.data)

    def describe(self) -> dict[str, Any]:
        """Return the original's own row, JSON-able."""
        return {
            "seed": self.seed,
            "bytes": self.facts.size_bytes,
            "params": self.facts.params,
            "macs": self.facts.macs,
            "peak_bytes": measuring.peak_bytes(self.whole, self.data),
            "score": self.answers.score.value,
            "score_name": self.answers.score.name,
            "higher_is_better": self.answers.score.higher_is_better,
            "validation": evaluate(self.model, self.data, "validate").value,
            "samples": len(self.answers.score.samples),
            "sensitivity": sensitivities(self.model, self.data),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Cell:
    """One contender at one budget under one seed, and where it is kept."""

    contender: Contender
    budget: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.contender.name}-{self.budget}-{self.seed}".replace("%", "pc").replace("/", "_")

    @property
    def path(self) -> Path:
        """Of its facts."""
        return self.folder / "cells" / f"{self.name}.json"

    def stored(self) -> dict[str, Any] | None:
        """Return the facts of a finished cell, or None; a damaged file is run again."""
        try:
            facts = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) and "status" in facts else None

    def files(self) -> tuple[Path, ...]:
        """Return where its recipe, its samples' scores and its compressed model lie, where it has them."""
        return tuple(self.path.with_suffix(suffix) for suffix in (".yaml", ".npz", ".fw"))

    def keep(self, facts: dict[str, Any]) -> None:
        """Write the facts, after which the cell is finished."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)

    def samples(self) -> np.ndarray[Any, Any]:
        """Return the score of each test sample, `[n]`."""
        with np.load(self.path.with_suffix(".npz"), allow_pickle=False) as arrays:
            return np.asarray(arrays["samples"])

    def run(self, ground: Ground, rules: Rules, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Return the cell's facts, from disk or by carrying it out.

        What a recipe cannot do is a fact too: `status` is `"done"`, or `"not applicable"` with `reason`.
        """
        if (known := self.stored()) is not None:
            return known
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        facts = {"recipe": self.contender.name, "kind": self.contender.kind, "budget": self.budget, "seed": self.seed}
        try:
            facts |= self._carried_out(ground, rules, progress)
        except FeatherweightError as error:
            facts |= {"status": "not applicable", "reason": " ".join(str(error).split())}
        facts["seconds_in_all"] = round(time.perf_counter() - begin, 3)
        self.keep(facts)
        shutil.rmtree(self.path.with_suffix(".run"), ignore_errors=True)
        return facts

    def _carried_out(self, ground: Ground, rules: Rules, progress: Callable[[str, float], None]) -> dict[str, Any]:
        limit = Budget.parse(f"size<={self.budget}").limits[0]
        allowed = limit.allowed(ground.facts.size_bytes)
        told: dict[str, Any] = {"allowed": round(allowed)}
        begin = time.perf_counter()
        if self.contender.recipe is None:
            artifact, model, facts = self._searched(ground, rules, progress)
        else:
            strength = 1.0
            if self.contender.scales:
                progress(f"{self.name}: how strong", 0.0)
                found = ground.scale.strength(self.contender.recipe, allowed)
                if found is None:
                    reason = f"not even at its strongest are its files of {limit}"
                    return {**told, "status": "not applicable", "reason": reason}
                strength = found
            recipe = with_epochs(_recipe(scaled(self.contender.recipe, strength)), rules.epochs)
            artifact, model, facts = self._trained(ground, rules, recipe, progress)
            facts["strength"] = strength
        seconds = time.perf_counter() - begin
        progress(f"{self.name}: measuring", 1.0)
        size = artifact.save(self.path.with_suffix(".fw"))
        loaded: Artifact = load(self.path.with_suffix(".fw"))
        after = answers(loaded.run, ground.model, ground.data)
        self._keep(after)
        return {
            **told,
            **facts,
            **beside(ground.answers, after),
            **_costs(ground, model, loaded, rules),
            "bytes": size,
            "ratio": ground.facts.size_bytes / size,
            "met": size <= allowed or not self.contender.scales,
            "layers": by_layer(ground.model, model, artifact.edits, loaded.bytes_by_part()),
            "seconds": seconds,
            "command": self.command(rules),
            "status": "done",
        }

    def _trained(
        self, ground: Ground, rules: Rules, recipe: Recipe, progress: Callable[[str, float], None]
    ) -> tuple[Artifact, nn.Module, dict[str, Any]]:
        """Train with each learning rate, and keep the best on validation data; a killed training goes on where it was."""
        best: tuple[Score, Outcome, Recipe, list[str]] | None = None
        for factor in RATES[: rules.tries]:
            tried = with_rate(recipe, factor)
            context = Context(
                data=ground.data,
                teacher=ground.model,
                device=torch.device(rules.device),
                seed=self.seed,
                workspace=self.path.with_suffix(".run"),
                report=lambda message, done: progress(f"{self.name}: {message}", done),
            )
            outcome = run(tried, ground.model, context)
            score = evaluate(outcome.model, ground.data, "validate", rules.device)
            if best is None or best[0].drop(score) < 0:
                best = (score, outcome, tried, [f"{item.path}: {item.reason}" for item in context.untouched])
        if best is None:
            raise RecipeError(f"tries={rules.tries}: at least one learning rate must be tried")
        score, outcome, tried, left = best
        model = outcome.model.cpu()
        facts = {"steps": tried.to_json(), "validation": score.value, "epochs": rules.epochs, "untouched": left[:20]}
        self.path.with_suffix(".yaml").write_text(recipe_to_yaml(tried))
        made = {"recipe": tried.to_json(), "seed": self.seed}
        return package(model, outcome.edits, made, ground.scale.graph(model, outcome.edits)), model, facts

    def _searched(
        self, ground: Ground, rules: Rules, progress: Callable[[str, float], None]
    ) -> tuple[Artifact, nn.Module, dict[str, Any]]:
        """Let `compress` meet the budget by itself: one candidate, whose mix short trainings choose."""
        out = self.path.with_suffix(".fw")
        artifact = compress(
            ground.model,
            ground.data,
            f"size<={self.budget}",
            trials=EVERY,
            epochs=max(2, rules.epochs),
            seed=self.seed,
            device=rules.device,
            out=out,
            resume=(out.with_name(out.name + ".run") / "request.json").exists(),
            progress=lambda message, done: progress(f"{self.name}: {message}", done),
        )
        recipe = recipe_from_json(artifact.facts["recipe"])
        epochs = sum(getattr(step, "epochs", 0) for step in recipe.steps)
        facts = {"steps": recipe.to_json(), "epochs": epochs, "untouched": []}
        self.path.with_suffix(".yaml").write_text(recipe_to_yaml(recipe))
        return artifact, artifact.into(ground.model), facts

    def _keep(self, after: Answers) -> None:
        held = {"samples": after.score.samples.float().numpy()}
        if after.top is not None:
            held["top"] = after.top.short().numpy()
        part = self.path.with_suffix(".part.npz")
        np.savez_compressed(part, **held)  # type: ignore[arg-type]
        os.replace(part, self.path.with_suffix(".npz"))

    def command(self, rules: Rules) -> str:
        """Return the command line that makes this row's file again."""
        words = ["featherweight", "compress", rules.task, "--budget", f"size<={self.budget}", "--seed", str(self.seed)]
        if self.contender.recipe is None:
            return shlex.join([*words, "--trials", str(EVERY), "--epochs", str(max(2, rules.epochs))])
        return shlex.join([*words, "--recipe", str(self.path.with_suffix(".yaml"))])


def _recipe(technique: Any) -> Recipe:
    return technique if isinstance(technique, Recipe) else Recipe((technique,))


def _costs(ground: Ground, model: nn.Module, artifact: Artifact, rules: Rules) -> dict[str, Any]:
    """What the file costs on ONNX Runtime, one sample and one thread, in turn with the original."""
    whole = artifact.onnx_bytes()
    counted = measuring.structure(model, ground.data)
    timed = latencies({"original": ground.whole, "file": whole}, ground.data, _SECONDS)
    inputs = example_inputs(ground.data, batch=1)
    calls = {name: Session(held).prepared(inputs) for name, held in (("original", ground.whole), ("file", whole))}
    energy, how = joules(calls["file"], timed["file"].median, rules.watts)
    first, _ = joules(calls["original"], timed["original"].median, rules.watts)
    return {
        "params": counted.params,
        "nonzero": counted.nonzero,
        "macs": counted.macs,
        "milliseconds": timed["file"].median * 1e3,
        "milliseconds_low": timed["file"].low * 1e3,
        "milliseconds_high": timed["file"].high * 1e3,
        "milliseconds_before": timed["original"].median * 1e3,
        "speedup": timed["original"].median / timed["file"].median,
        "peak_bytes": measuring.peak_bytes(whole, ground.data),
        "millijoules": energy * 1e3,
        "millijoules_before": first * 1e3,
        "energy": how if how == "RAPL" else f"estimate: time x {rules.watts:g} W",
    }
