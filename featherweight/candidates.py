"""Candidates of the joint search for one job: priced untrained, and trained and scored as trials."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from torch import nn

from featherweight import measurement as measuring
from featherweight.allocation import EIGHTHS, PREPARED, Tables, loose_parameters, tables_of, with_seconds
from featherweight.contest import Contest
from featherweight.edits import Edit
from featherweight.errors import DivergedError
from featherweight.job import MARGIN, Job, Result, file_floor
from featherweight.mixes import MIXES
from featherweight.portable import assemble
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.search import Strength, Trial, first_strength, search
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, QuantizeStatic, RoundParameters
from featherweight.untrained import Untrained

_SPARED = 4  # times shorter than the whole a training must be to be worth trying first
_CORRECTIONS = 6  # of the seconds of one mix
_FASTER = 0.9  # of the time of floats, that integers may take: what rounds activations for less gives accuracy away


class Candidates:
    """What the search may ask of a job.

    Attributes:
        costs: of the original, as of `search`, and `floor`, as of `Mixer`.
        integers: whether limited seconds ask for activations of 8 bits: not where the runtime computes them no faster than floats,
            as on x86 without VNNI, or where layers are so small that conversions take longer.

    Args:
        job: started.

    Raises:
        RecipeError: there is no training data, and the budget limits what only cuts can make smaller.
    """

    def __init__(self, job: Job) -> None:
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
        prepared, edits = run(PREPARED, job.model, context)
        prepared, kept = prepared.cpu(), tuple(loose_parameters(prepared, context))
        rounded, _ = run(RoundParameters(), prepared, replace(context, scope=(kept,))) if kept else (prepared, [])
        self.costs["floor"] = float(file_floor(rounded, edits, job.graph_of(prepared, edits), kept))
        self.priced: dict[Recipe, dict[str, float]] = {}  # by untrained recipe
        self.integers = True
        self.contest: Contest | Untrained
        if job.data.train is None:
            self.contest = Untrained(job, self.price, self.costs)
        else:
            self.contest = Contest(job, self._tables(prepared, edits, context), self.costs)

    def _tables(self, prepared: nn.Module, edits: list[Edit], context: Context) -> Tables:
        """Damage and costs of every treatment of the prepared model, in seconds too where they are limited."""
        if "latency" not in self.costs:
            return tables_of(prepared, context)
        whole = self._shipped(prepared, edits)
        return with_seconds(
            tables_of(prepared, context, shares=EIGHTHS), prepared, context, whole, self.whole, self.job.table
        )

    def _shipped(self, prepared: nn.Module, edits: list[Edit]) -> bytes:
        """The prepared model, nothing cut, in the form that its runtime computes fastest, which `integers` says."""
        job = self.job
        plain = job.execute(Recipe((FoldBatchNorm(), QuantizeStatic())), by_user=False, measure=False)
        forms = {
            True: assemble(plain.graph, plain.model.state_dict()),
            False: assemble(job.graph_of(prepared, edits), prepared.state_dict()),
        }
        took = {integers: job.table.candidate(form, self.whole, job.data) for integers, form in forms.items()}
        self.integers = took[True] <= _FASTER * took[False]
        if not self.integers:
            job.progress(
                f"integers take {took[True] / took[False]:.0%} of the time of floats: activations stay floats", 0.0
            )
        return forms[self.integers]

    def first_strength(self) -> Strength:
        """Return the strength that the search starts at."""
        return first_strength(self.budget, self.costs, self.cheap, self.job.epochs, self.integers)

    def search(self) -> list[Trial]:
        """Return the trials, the best last."""
        return search(self.budget, self.costs, self.first_strength(), self.full, self.job.request.trials)

    def cheap(self, strength: Strength) -> dict[str, float]:
        """Return the costs of the untrained candidate."""
        job = self.job
        job.progress(f"estimating {strength.factor:g}x, {strength.share:.0%} of the {strength.metric}", 0.0)
        return self.price(self.contest.recipe(strength, next(iter(MIXES)), trains=False))

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
            measured = self.price(self.contest.recipe(strength, mix, trains=False))["latency"]
            faster = strength.faster(measured, limit.allowed(self.costs["latency"]))
            if faster == strength:
                break
            strength = faster
        return strength

    def full(self, strength: Strength) -> Trial:
        """Train and score the candidate, with the mix that heals best.

        Where the drop has a limit, what already keeps every limit after a short training is not trained longer.
        """
        mix, strength = self.contest.winner(strength)
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
        """Train and score the candidate of a strength and mix, slower where the loss stops being finite.

        Raises:
            DivergedError: it does so at the slowest learning rates.
        """
        job, begin = self.job, time.perf_counter()
        recipe = self.contest.recipe(strength, mix)
        try:  # the only trial is the file: it is measured step by step at once
            result = job.execute(recipe, by_user=False, measure=self.budget.limit("drop") is None)
        except DivergedError as diverged:
            if isinstance(self.contest, Untrained):
                raise
            return self.trial(self.contest.slower(strength, diverged), mix)
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
