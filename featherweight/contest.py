"""Which mix of families heals best, and at which learning rate: trainings, compared on validation data."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

from featherweight.allocation import Tables
from featherweight.allocation.truth import Reference
from featherweight.errors import DivergedError
from featherweight.job import Job, Result
from featherweight.mixes import MIXES, UNIFORM, Mix, Mixer, drawn
from featherweight.search import FULL, ROOM, SHORT, Strength
from featherweight.technique import Context, Recipe

_COMPARED = 2048  # validation samples on which mixes are compared
_EPOCHS = 8  # with fewer, a whole epoch is no short training
_FINALISTS = 2  # mixes that are trained for a part of an epoch; the others look worse untrained
_RUNGS = ((SHORT, 1), (2, 2), (1, 2))
"""How many times shorter than a trial the rounds of trainings are that compare mixes, and of how many mixes each leaves one.

The first only makes their files as large as they may be. After a quarter, what prunes or rounds much still looks worse than it ends.
"""
_ONE_ROUND = ((SHORT, 2),)
_PACES = (1.0, 1 / 4, 1 / 16)
"""Factors on the usual learning rates: pretrained Transformers want slower ones than networks trained from nothing."""
_CLEARLY = 0.4  # of a divergence: short trainings favour slow rates, and whole ones make up for fast ones that are twice as far
_DRAWN = 7  # mixes drawn beside the named ones where trainings are quick, and at most as many as trials


class Contest:
    """The mixes of one job, and the trainings that decide between them.

    Args:
        job: started.
        tables: of the prepared model.
        costs: of the original, as of `Mixer`.
    """

    def __init__(self, job: Job, tables: Tables, costs: dict[str, float]) -> None:
        self._job, self._costs, self._mixer = job, costs, Mixer(tables, costs)
        self._drawn = drawn(min(_DRAWN, job.request.trials), job.request.seed)
        self._mixes: dict[str, Mix | None] = {**MIXES, UNIFORM: None, **self._drawn}
        self._best: str | None = None
        self._pace = 1.0

    def recipe(self, strength: Strength, mix: str, trains: bool = True) -> Recipe:
        """Return the recipe of a strength and mix."""
        return self._mixer.recipe(strength, self._mixes[mix], trains)

    def winner(self, strength: Strength) -> tuple[str, Strength]:
        """Return the mix that heals best, for all trials, and the strength at which its file is as large as it may be.

        The best is the one whose training ends nearest to the original's outputs on validation data. All mixes are trained
        shorter than a trial; the better half of them longer, and so on, each corrected by what its file was over the limit or left.
        Before, short trainings of one of them choose the learning rates for all; where a loss stops being finite, slower ones are taken.

        Raises:
            DivergedError: it does so at the slowest.
        """
        if self._best is None:
            self._pace = self._slowed(strength)
            strength = dataclasses.replace(strength, pace=self._pace)
        while self._best is None:
            try:
                self._best, strength = self._compared(strength)
            except DivergedError as error:
                strength = self.slower(strength, error)
        return self._best, dataclasses.replace(strength, pace=self._pace)

    def slower(self, strength: Strength, error: DivergedError) -> Strength:
        """Return a strength with the next slower learning rates, which all that is trained from now on has too.

        Args:
            strength: whose training diverged.
            error: that said so.

        Raises:
            DivergedError: there are none.
        """
        rates = [pace for pace in _PACES if pace < strength.pace]
        if not rates:
            raise error
        self._pace = rates[0]
        self._job.progress(f"{error}: all learning rates become {self._pace:g} of the usual ones", 1.0)
        return dataclasses.replace(strength, pace=self._pace)

    def _compared(self, strength: Strength) -> tuple[str, Strength]:
        """The mix that heals best, and its strength."""
        running = self._entrants(strength)
        rungs, steps = self._rungs(strength), self._steps(strength)
        for times, several in rungs:
            told: dict[str, float] = {}
            trained: dict[str, tuple[Strength, int]] = {}
            for name, own in running.items():
                told[name], result = self._heal(own.shorter(times), name, steps)
                trained[name], running[name] = (own, self._job.size(result)), self._resized(own, result)
            better = sorted(told, key=told.__getitem__)[: math.ceil(len(told) / several)]
            running = {name: running[name] for name in better}
        best = next(iter(running))
        return best, self._fitting(best, running[best], *trained[best])

    def _slowed(self, strength: Strength) -> float:
        """The factor on the usual learning rates whose training ends nearest to the original; 1 where none is clearly nearer.

        Slower ones are tried until one is worse than the one before it.
        """
        told: dict[float, float] = {}
        for pace in _PACES:
            own = dataclasses.replace(strength.shorter(), pace=pace)
            about = f"learning rate {own.healing.rate:g}"
            try:
                told[pace], _ = self._heal(own, next(iter(MIXES)), self._steps(strength), about)
            except DivergedError:
                told[pace] = math.inf
            if told[pace] > min(told.values()):
                break
        best = min(told, key=told.__getitem__)
        return best if told[best] < _CLEARLY * told[_PACES[0]] else _PACES[0]

    def epochs(self, strength: Strength) -> float:
        """Return the epochs that comparing mixes takes in all, at most."""
        steps, mixes = self._steps(strength), len(self._names(strength))
        total = float(len(_PACES) * strength.shorter().healing.total)
        for times, several in self._rungs(strength):
            total += mixes * strength.shorter(times).healing.total
            mixes = math.ceil(mixes / several)
        loader: Any = self._job.data.train
        return total if steps is None else total * steps / len(loader)

    def _rungs(self, strength: Strength) -> tuple[tuple[int, int], ...]:
        """The rounds of trainings that compare mixes, as of `_RUNGS`.

        Successive halving (Jamieson & Talwalkar, AISTATS 2016), to trainings as long as a trial, where trials are quick and only
        costs are limited that training hardly changes: mixes heal at different speeds. Else one round.
        """
        quick = self._steps(strength) is None and self._job.quick and self._job.request.trials > 1
        return _RUNGS if quick and self._fills else _ONE_ROUND

    @cached_property
    def _fills(self) -> bool:
        """Whether a file that leaves much of a limited size is made larger: neither a score nor seconds ask for a small one."""
        return all(self._job.request.budget.limit(name) is None for name in ("drop", "latency"))

    def _entrants(self, strength: Strength) -> dict[str, Strength]:
        """The mixes to compare, none that comes to the same as one before it, and the strength of each."""
        recipes: dict[Recipe, str] = {}
        for name in self._names(strength):
            recipes.setdefault(self.recipe(strength.shorter(), name), name)
        found = list(recipes.values())
        return dict.fromkeys(found, strength) if self._steps(strength) is None else self._nearest(strength, found)

    def _names(self, strength: Strength) -> list[str]:
        """As many named mixes as there may be trials, and where trainings are quick more that are drawn."""
        named = [*MIXES, *([UNIFORM] if strength.share == 1 and not strength.static else [])]
        more = self._drawn if len(self._rungs(strength)) > 1 else ()
        return [*named[: self._job.request.trials], *more]

    def _steps(self, strength: Strength) -> int | None:
        """Of an epoch of a short training; all where the full one has epochs enough that a whole one is short."""
        loader: Any = self._job.data.train
        if strength.epochs >= _EPOCHS or not hasattr(loader, "__len__"):
            return None
        return max(1, round(len(loader) * strength.epochs / SHORT))

    @cached_property
    def _reference(self) -> Reference:
        """The original's outputs on validation data."""
        data = dataclasses.replace(self._job.data, calibrate=self._job.data.validate)
        return Reference(self._job.model, Context(data=data), _COMPARED)

    def _nearest(self, strength: Strength, names: list[str]) -> dict[str, Strength]:
        """The mixes whose untrained candidates are nearest to the original, where training takes long: as many as are trained.

        What each made of the same strength is of another size, and so each gets its own.
        """
        if len(names) == 1:
            return {names[0]: strength}
        told, resized = {}, {}
        for name in names:
            recipe = self.recipe(strength, name, trains=False)
            result = self._job.execute(recipe, by_user=False, measure=False)
            told[name], resized[name] = self._reference.divergence(result.model), self._resized(strength, result)
        return {name: resized[name] for name in sorted(told, key=told.__getitem__)[:_FINALISTS]}

    def _fitting(self, name: str, wanted: Strength, trained: Strength, size: int) -> Strength:
        """The wanted strength of a mix, or the trained one where the wanted, milder one's file would be too large: sizes go in steps.

        Args:
            name: of the mix.
            wanted: at which its file is as large as it may be, if sizes were in proportion.
            trained: at which it has been trained.
            size: bytes of its file then.
        """
        limit = self._job.request.budget.limit("size")
        if limit is None or wanted.factor >= trained.factor:
            return wanted
        before, after = (
            self._job.size(self._job.execute(self.recipe(one, name, trains=False), by_user=False, measure=False))
            for one in (trained, wanted)
        )
        return wanted if size * after / before <= limit.allowed(self._job.before.size_bytes) else trained

    def _heal(self, strength: Strength, name: str, steps: int | None, about: str = "") -> tuple[float, Result]:
        """The divergence of a mix after the training of a strength, of so many steps an epoch, and the candidate."""
        job = self._job
        result = job.execute(self.recipe(strength, name), by_user=False, measure=False, steps=steps)
        found = self._reference.divergence(result.model)
        trained = f"{strength.healing.total} epochs" + (f" of {steps} steps" if steps is not None else "")
        job.progress(f"{about or f'mix {name}'}: {found:.4f} nats from the original after {trained}", 1.0)
        return found, result

    def _resized(self, strength: Strength, result: Result) -> Strength:
        """The strength itself where the candidate's file is as large as it may be, else the one at which it would be."""
        limit = self._job.request.budget.limit("size")
        if limit is None:
            return strength
        size, allowed = self._job.size(result), limit.allowed(self._job.before.size_bytes)
        if size <= allowed and not (self._fills and size < FULL * allowed):
            return strength
        return strength.resized(size, ROOM * allowed, self._costs)
