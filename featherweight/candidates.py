"""Candidates of the joint search for one job: priced untrained, mixes compared by short trainings, trials trained."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cached_property
from typing import Any

from featherweight import measurement as measuring
from featherweight.allocation import EIGHTHS, tables_of, with_seconds
from featherweight.allocation.truth import Reference
from featherweight.errors import RecipeError
from featherweight.job import MARGIN, Job, Result, file_floor
from featherweight.portable import assemble
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.search import MIXES, ROOM, SHORT, UNIFORM, Mix, Strength, Trial, drawn, mixed, search
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, QuantizeStatic

_COMPARED = 2048  # validation samples on which mixes are compared
_EPOCHS = 8  # with fewer, a whole epoch is no short training
_FINALISTS = 2  # mixes that are trained for a part of an epoch; the others look worse untrained
_SPARED = 4  # times shorter than the whole a training must be to be worth trying first
_CORRECTIONS = 6  # of the seconds of one mix
_RUNGS = ((SHORT, 1), (2, 2), (1, 2))
"""How many times shorter than a trial the rounds of trainings are that compare mixes, and of how many mixes each leaves one.

The first only makes their files as large as they may be. After a quarter, what prunes or rounds much still looks worse than it ends.
"""
_ONE_ROUND = ((SHORT, 2),)
_DRAWN = 7  # mixes drawn beside the named ones where trainings are quick, and at most as many as trials
_FULL = 0.96  # of a limited size: a file that leaves more is made larger where trainings are quick


class Candidates:
    """What the search may ask of a job.

    Args:
        job: started.

    Raises:
        RecipeError: there is no training data to heal on.
    """

    def __init__(self, job: Job) -> None:
        if job.data.train is None:
            raise RecipeError(
                "the default recipe heals by training and Data(train=...) is missing: give it, or a recipe"
            )
        self.job = job
        self.budget = job.request.budget
        self.whole = assemble(job.original, job.model.state_dict())
        facts = {"size": job.before.size_bytes, "params": job.before.params, "macs": job.before.macs or 0}
        self.costs = {name: float(value) for name, value in facts.items()}
        if self.budget.limit("latency") is not None:
            self.costs["latency"] = job.table.original(self.whole, job.data)
        if self.budget.limit("memory") is not None:
            self.costs["memory"] = float(measuring.peak_bytes(self.whole, job.data))
        context = Context(data=job.data, device=job.request.device, seed=job.request.seed, report=job.progress)
        folded, edits = run(FoldBatchNorm(), job.model, context)
        self.costs["floor"] = float(file_floor(folded.cpu(), edits, job.graph_of(folded, edits)))
        more = drawn(min(_DRAWN, job.request.trials), job.request.seed)
        self.mixes: dict[str, Mix | None] = {**MIXES, UNIFORM: None, **more}
        self.best: str | None = None
        self.priced: dict[Recipe, dict[str, float]] = {}  # by untrained recipe
        if "latency" in self.costs:
            plain = job.execute(Recipe((FoldBatchNorm(), QuantizeStatic())), by_user=False, measure=False)
            whole, tables = assemble(plain.graph, plain.model.state_dict()), tables_of(folded, context, shares=EIGHTHS)
            self.tables = with_seconds(tables, folded, context, whole, self.whole, job.table)
        else:
            self.tables = tables_of(folded, context)

    def search(self) -> list[Trial]:
        """Return the trials, the best last."""
        return search(self.budget, self.costs, self.cheap, self.full, self.job.epochs, self.job.request.trials)

    def recipe(self, strength: Strength, mix: str, trains: bool = True) -> Recipe:
        """Return the recipe of a strength and mix."""
        return mixed(strength, self.mixes[mix], self.tables, self.costs, trains)

    def cheap(self, strength: Strength) -> dict[str, float]:
        """Return the costs of the untrained candidate."""
        job = self.job
        job.progress(f"estimating {strength.factor:g}x, {strength.share:.0%} of the {strength.metric}", 0.0)
        return self.price(self.recipe(strength, next(iter(MIXES)), trains=False))

    def price(self, recipe: Recipe) -> dict[str, float]:
        """Return the costs of a recipe that trains nothing, carried out once."""
        if recipe not in self.priced:
            job = self.job
            result = job.execute(recipe, by_user=False, measure=False)
            facts = measuring.structure(result.model, job.data)
            costs = {"size": float(job.size(result)), "params": float(facts.params), "macs": float(facts.macs or 0)}
            if "latency" in self.costs:
                costs["latency"] = self.seconds(result)
            if "memory" in self.costs:
                whole = assemble(result.graph, result.model.state_dict())
                costs["memory"] = float(measuring.peak_bytes(whole, job.data))
            self.priced[recipe] = costs
        return self.priced[recipe]

    def seconds(self, result: Result) -> float:
        """Return what the latency table says of a candidate."""
        whole = assemble(result.graph, result.model.state_dict())
        return self.job.table.candidate(whole, self.whole, self.job.data)

    def in_time(self, strength: Strength, mix: str) -> Strength:
        """Return the strength at which a mix keeps the latency limit, by the untrained candidate; the fastest tried when none does."""
        limit = self.budget.limit("latency")
        if limit is None:
            return strength
        for _ in range(_CORRECTIONS):
            measured = self.price(self.recipe(strength, mix, trains=False))["latency"]
            faster = strength.faster(measured, limit.allowed(self.costs["latency"]))
            if faster == strength:
                break
            strength = faster
        return strength

    def full(self, strength: Strength) -> Trial:
        """Train and score the candidate, with the mix that heals best.

        Where the drop has a limit, what already keeps every limit after a short training is not trained longer.
        """
        mix, strength = self.chosen(strength)
        strength = self.in_time(strength, mix)
        if self.spared(strength):
            trial = self.trial(strength.shorter(), mix)
            if trial.holds:
                return trial
        return self.trial(strength, mix)

    def spared(self, strength: Strength) -> bool:
        """Whether a short training is tried before the whole one: where it is much shorter, and a drop limit can be kept."""
        return (
            self.budget.limit("drop") is not None
            and _SPARED * strength.shorter().healing.total <= strength.healing.total
        )

    def trial(self, strength: Strength, mix: str) -> Trial:
        """Train and score the candidate of a strength and mix."""
        job, begin = self.job, time.perf_counter()
        recipe = self.recipe(strength, mix)
        # the only trial is the file: it is measured step by step at once
        result = job.execute(recipe, by_user=False, measure=self.budget.limit("drop") is None)
        size = job.size(result)
        score = result.score or evaluate(result.model, job.data, "validate", job.request.device)
        drop, error = job.score.drop(score), job.score.drop_error(score)
        limits = {name: self.budget.limit(name) for name in ("size", "drop", "latency")}
        fits = limits["size"] is None or size <= limits["size"].allowed(job.before.size_bytes)
        if limits["latency"] is not None:
            fits = fits and self.seconds(result) <= limits["latency"].allowed(self.costs["latency"])
        margin = MARGIN * error if math.isfinite(error) else 0.0  # a score that is one number has no error to go by
        good = limits["drop"] is None or drop + margin <= limits["drop"].allowed(job.score.value) + 1e-12
        trial = Trial(strength, recipe, size, score, drop, error, fits, good, time.perf_counter() - begin)
        job.progress(f"trial {strength.factor:g}x: {size:,} bytes, drop {drop:.4f} on validation", 1.0)
        return trial

    def chosen(self, strength: Strength) -> tuple[str, Strength]:
        """Return the mix that heals best, for all trials, and the strength at which its file is as large as it may be.

        The best is the one whose training ends nearest to the original's outputs on validation data. All mixes are trained
        shorter than a trial; the better half of them longer, and so on, each corrected by what its file was over the limit or left.
        """
        if self.best is None:
            running = dict.fromkeys(self._mixes(strength), strength)
            rungs, steps = self._rungs(strength), self._steps(strength)
            for times, several in rungs:
                told: dict[str, float] = {}
                for name, own in running.items():
                    told[name], result = self._heal(own.shorter(times), name, steps)
                    running[name] = self._resized(own, result, fills=len(rungs) > 1)
                better = sorted(told, key=told.__getitem__)[: math.ceil(len(told) / several)]
                running = {name: running[name] for name in better}
            self.best = next(iter(running))
            return self.best, running[self.best]
        return self.best, strength

    def comparing(self, strength: Strength) -> float:
        """Return the epochs that comparing mixes takes in all, at most."""
        steps, total, mixes = self._steps(strength), 0.0, len(self._names(strength))
        loader: Any = self.job.data.train
        for times, several in self._rungs(strength):
            total += mixes * strength.shorter(times).healing.total * (1.0 if steps is None else steps / len(loader))
            mixes = math.ceil(mixes / several)
        return total

    def _rungs(self, strength: Strength) -> tuple[tuple[int, int], ...]:
        """The rounds of trainings that compare mixes, as of `_RUNGS`.

        Successive halving (Jamieson & Talwalkar, AISTATS 2016), to trainings as long as a trial, where trials are quick and only
        costs are limited that training hardly changes: mixes heal at different speeds. Else one round.
        """
        quick = self._steps(strength) is None and self.job.quick and self.job.request.trials > 1
        scored = any(self.budget.limit(name) is not None for name in ("drop", "latency"))
        return _RUNGS if quick and not scored else _ONE_ROUND

    def _mixes(self, strength: Strength) -> list[str]:
        """The mixes to compare, none that comes to the same as one before it."""
        recipes: dict[Recipe, str] = {}
        for name in self._names(strength):
            recipes.setdefault(self.recipe(strength.shorter(), name), name)
        found = list(recipes.values())
        return found if self._steps(strength) is None else self._nearest(strength, found)

    def _names(self, strength: Strength) -> list[str]:
        """As many named mixes as there may be trials, and where trainings are quick more that are drawn."""
        named = [*MIXES, *([UNIFORM] if strength.share == 1 and not strength.static else [])]
        more = [name for name in self.mixes if name not in MIXES and name != UNIFORM]
        return named[: self.job.request.trials] + (more if len(self._rungs(strength)) > 1 else [])

    def _steps(self, strength: Strength) -> int | None:
        """Of an epoch of a short training; all where the full one has epochs enough that a whole one is short."""
        loader: Any = self.job.data.train
        if strength.epochs >= _EPOCHS or not hasattr(loader, "__len__"):
            return None
        return max(1, round(len(loader) * strength.epochs / SHORT))

    @cached_property
    def _reference(self) -> Reference:
        """The original's outputs on validation data."""
        data = dataclasses.replace(self.job.data, calibrate=self.job.data.validate)
        return Reference(self.job.model, Context(data=data), _COMPARED)

    def _nearest(self, strength: Strength, names: list[str]) -> list[str]:
        """The mixes whose untrained candidates are nearest to the original, where training takes long: as many as are trained."""
        if len(names) <= _FINALISTS:
            return names
        told = {
            name: self._reference.divergence(
                self.job.execute(self.recipe(strength, name, trains=False), by_user=False, measure=False).model
            )
            for name in names
        }
        return sorted(told, key=told.__getitem__)[:_FINALISTS]

    def _heal(self, strength: Strength, name: str, steps: int | None) -> tuple[float, Result]:
        """The divergence of a mix after the training of a strength, of so many steps an epoch, and the candidate."""
        job = self.job
        result = job.execute(self.recipe(strength, name), by_user=False, measure=False, steps=steps)
        found = self._reference.divergence(result.model)
        trained = f"{strength.healing.total} epochs" + (f" of {steps} steps" if steps is not None else "")
        job.progress(f"mix {name}: {found:.4f} nats from the original after {trained}", 1.0)
        return found, result

    def _resized(self, strength: Strength, result: Result, fills: bool) -> Strength:
        """The strength itself where the candidate's file fits, else the one at which it would.

        Args:
            strength: of the candidate.
            result: the candidate.
            fills: whether a file that leaves much of the limit is made larger.
        """
        limit = self.budget.limit("size")
        if limit is None:
            return strength
        size, allowed = self.job.size(result), limit.allowed(self.job.before.size_bytes)
        if size <= allowed and not (fills and size < _FULL * allowed):
            return strength
        return strength.resized(size, ROOM * allowed, self.costs)
