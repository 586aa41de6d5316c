"""A search over recipes for several goals at once, that no failure can change: it is a function of its seed and its results.

Trials come in closed generations. All of one generation are drawn before any of its results is told, each by a sampler
seeded by the trial's number, and results are told in the order of the numbers, however and wherever they came in. A
generation climbs a ladder of training lengths (successive halving; Jamieson & Talwalkar, 2016): all train shortly, the
promising ones again and longer. Every result is in the journal before it is used. So a search that was killed draws the same
recipes again, reads from the journal what they gave, and goes on where nothing is known.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.budget import Budget
from featherweight.errors import RecipeError, closest, need
from featherweight.journal import Journal, Row
from featherweight.spaces import Space
from featherweight.technique import Recipe
from featherweight.trials import Assignment
from featherweight.workers import Result, Workers

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("nsga2", "tpe", "gp", "random")
_HOPELESS = 0.5  # over a limit of costs by this share after short training: longer training will not help
_PROMOTED = 1 / 3

Values = Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What is searched for, and how.

    Attributes:
        budget: limits that the best recipe keeps.
        original: the original's `score`, `size`, `params`, `macs`, and `latency` and `memory` where limited.
        goals: what is made small, the most important first, of `"drop"`, `"size"`, `"params"`, `"macs"`, `"latency"`,
            `"memory"`.
        sampler: `"nsga2"` (Deb et al., 2002), `"tpe"` (Bergstra et al., 2011), `"gp"` (Gaussian process) or `"random"`.
        seed: of the sampler.
        trials: recipes to draw.
        generation: trials that are drawn before any of their results is told; more workers than this idle.
        rungs: shares of the training that a generation goes through, rising to 1; a third is promoted to the next.
        about: what else a resumed search must agree on, JSON-able.
    """

    budget: Budget
    original: Mapping[str, float]
    goals: tuple[str, ...]
    sampler: str = "nsga2"
    seed: int = 0
    trials: int = 24
    generation: int = 8
    rungs: tuple[float, ...] = (0.2, 1.0)
    about: str = ""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise RecipeError(f"sampler {self.sampler!r} is not known.{closest(self.sampler, SAMPLERS)}")
        if self.trials < 1 or self.generation < 1:
            raise RecipeError(f"trials={self.trials} and generation={self.generation} must be at least 1")
        rising = all(a < b for a, b in zip((0.0, *self.rungs), self.rungs, strict=False))
        if not self.rungs or not rising or self.rungs[-1] != 1.0:
            raise RecipeError(f"rungs={self.rungs} must be shares that rise from above 0 to 1, such as (0.2, 1.0)")

    def to_json(self) -> dict[str, Any]:
        """Return the JSON-able form; `from_json` reads it."""
        return {
            "budget": str(self.budget),
            "original": dict(self.original),
            "goals": list(self.goals),
            "sampler": self.sampler,
            "seed": self.seed,
            "trials": self.trials,
            "generation": self.generation,
            "rungs": list(self.rungs),
            "about": self.about,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """Read what `to_json` gave."""
        lists = {"goals": tuple(value["goals"]), "rungs": tuple(value["rungs"])}
        return cls(**{**value, **lists, "budget": Budget.parse(value["budget"])})

    def excess(self, values: Values) -> dict[str, float]:
        """Return by how much each limit is exceeded, at most 0 where it is kept: a share of it, for a drop score units.

        A drop counts with its margin for chance, since the best of many looks better on validation data than it is.
        """
        found = {}
        for limit in self.budget.limits:
            if limit.metric == "drop":
                found["drop"] = values["drop_bound"] - limit.allowed(self.original["score"]) - 1e-12
            else:
                found[limit.metric] = values[limit.metric] / limit.allowed(self.original[limit.metric]) - 1
        return found

    def meets(self, values: Values) -> bool:
        """Whether every limit is kept."""
        return all(over <= 0 for over in self.excess(values).values())

    def merit(self, values: Values) -> tuple[float, ...]:
        """Return what orders trials, the best largest: those that keep the limits, then those that come closest.

        Among those that keep them the smallest in the first goal wins, which is a cost where the drop has a limit.
        """
        over = sum(max(0.0, value) for value in self.excess(values).values())
        return (0.0, -over) if over else (1.0, *(-values[goal] for goal in self.goals))


@dataclass
class _Trial:
    """A drawn recipe, and what it gave so far."""

    number: int
    recipe: Recipe
    handle: optuna.Trial
    result: Result

    @property
    def values(self) -> Values | None:
        return self.result.get("values")


class Study:
    """One search; `run` carries it out or goes on with it."""

    def __init__(self, space: Space, plan: Plan, journal: Journal) -> None:
        """Start a search in an empty journal, or go on with the one that is in it.

        Args:
            space: draws recipes.
            plan: what is searched for; only `trials` may differ from what the journal was started with.
            journal: open; the study appends to it.

        Raises:
            RecipeError: the journal belongs to another search.
            ExportError: Optuna is not installed.
        """
        self._optuna = need("optuna", "search", "a search over recipes")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self.space, self.plan, self.journal = space, plan, journal
        if not journal.rows:
            journal.append({"plan": plan.to_json()})
        stored = journal.rows[0].get("plan") or {}
        for key, value in plan.to_json().items():
            if key not in ("trials", "original") and stored.get(key) != value:
                raise RecipeError(
                    f"{journal.path} belongs to a search with {key}={stored.get(key)!r}, not {value!r}: "
                    "go on with the same, or start another one elsewhere"
                )
        self.known = {_key(row["recipe"], row["rung"]): row for row in journal.rows if "recipe" in row}
        self.optuna: optuna.Study = self._optuna.create_study(directions=["minimize"] * len(plan.goals))

    def run(self, workers: Workers, watch: Callable[[Standing], None] = lambda standing: None) -> Standing:
        """Carry the search out to its last trial, and return how it stands.

        Args:
            workers: who carries out the trials.
            watch: called after each result.
        """
        self.journal.append({"session": {"workers": workers.count, "time": time.time(), "trials": self.plan.trials}})
        for first in range(0, self.plan.trials, self.plan.generation):
            numbers = range(first, min(first + self.plan.generation, self.plan.trials))
            trials = [self._draw(number) for number in numbers]
            climbing = trials
            for rung in range(len(self.plan.rungs)):
                self._measure(climbing, rung, workers, watch)
                climbing = promoted(self.plan, [t for t in climbing if t.values is not None])
            for trial in trials:
                self._tell(trial)
        self.journal.append({"finished": self.plan.trials})
        standing = stand(self.journal.rows)
        watch(standing)
        return standing

    def _draw(self, number: int) -> _Trial:
        self.optuna.sampler = self._sampler(number)
        trial = self.optuna.ask()
        return _Trial(number, self.space(trial), trial, {})

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        samplers, count = self._optuna.samplers, self.plan.generation
        digest = hashlib.sha256(f"{self.plan.seed} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        if self.plan.sampler == "nsga2":
            made = samplers.NSGAIISampler(population_size=max(2, count), seed=seed)
        elif self.plan.sampler == "tpe":
            made = samplers.TPESampler(n_startup_trials=count, seed=seed)
        elif self.plan.sampler == "gp":
            made = samplers.GPSampler(n_startup_trials=count, seed=seed)
        else:
            made = samplers.RandomSampler(seed=seed)
        return made  # type: ignore[no-any-return]

    def _measure(
        self, trials: Sequence[_Trial], rung: int, workers: Workers, watch: Callable[[Standing], None]
    ) -> None:
        """Fill in what trials give at a rung: from the journal, or by the workers; equal recipes are measured once."""
        wanted: dict[str, Assignment] = {}
        for trial in trials:
            recipe = trial.recipe.to_json()
            key = _key(recipe, rung)
            if key not in self.known and key not in wanted:
                wanted[key] = Assignment(trial.number, rung, self.plan.rungs[rung], recipe)

        def done(given: Assignment, result: Result) -> None:
            row: Row = {"trial": given.number, "rung": given.rung, "recipe": given.recipe, **result}
            self.journal.append(row)
            self.known[_key(given.recipe, given.rung)] = row
            watch(stand(self.journal.rows))

        if wanted:
            workers.run(list(wanted.values()), done)
        for trial in trials:
            trial.result = self.known[_key(trial.recipe.to_json(), rung)]

    def _tell(self, trial: _Trial) -> None:
        if trial.values is None:
            trial.handle.set_user_attr("failed", trial.result["failed"])
            self.optuna.tell(trial.handle, state=self._optuna.trial.TrialState.FAIL)
            return
        trial.handle.set_user_attr("recipe", trial.recipe.to_json())
        trial.handle.set_user_attr("share", self.plan.rungs[trial.result["rung"]])
        for metric, over in self.plan.excess(trial.values).items():
            trial.handle.set_constraint(metric, over)
        self.optuna.tell(trial.handle, [trial.values[goal] for goal in self.plan.goals])


def promoted(plan: Plan, trials: Sequence[_Trial]) -> list[_Trial]:
    """Return the third of the trials that trains on, in the order of their numbers.

    Those over a limit of costs come last, and not at all when they are far over; the rest go by the fronts they are on, and
    within a front the emptiest neighbourhood first (as in NSGA-II).
    """

    def over(trial: _Trial) -> float:
        values = plan.excess(trial.values or {})
        return max([0.0, *(value for metric, value in values.items() if metric != "drop")])

    candidates = [trial for trial in trials if over(trial) <= _HOPELESS]
    order = ranks([[(trial.values or {})[goal] for goal in plan.goals] for trial in candidates])
    best = sorted(range(len(candidates)), key=lambda i: (over(candidates[i]), *order[i], candidates[i].number))
    taken = best[: math.ceil(len(trials) * _PROMOTED)]
    return sorted((candidates[i] for i in taken), key=lambda trial: trial.number)


def ranks(points: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """Return for each point which front it is on, 0 the best, and minus its distance to its neighbours there.

    Args:
        points: one row a point, less is better in every column.
    """
    front = [0] * len(points)
    left = set(range(len(points)))
    level = 0
    while left:
        best = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        for i in best:
            front[i] = level
        left, level = left - best, level + 1
    spread = [0.0] * len(points)
    for level in set(front):
        members = [i for i in range(len(points)) if front[i] == level]
        for column in zip(*(points[i] for i in members), strict=True):
            order = sorted(range(len(members)), key=lambda place: (column[place], place))
            width = (column[order[-1]] - column[order[0]]) or 1.0
            for before, middle, after in zip(order, order[1:], order[2:], strict=False):
                spread[members[middle]] += (column[after] - column[before]) / width
            for end in (order[0], order[-1]):
                spread[members[end]] = math.inf
    return [(level, -gap) for level, gap in zip(front, spread, strict=True)]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a point is nowhere worse (larger) than another, and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Standing:
    """How a search stands.

    Attributes:
        plan: what is searched for.
        done: results so far.
        total: results expected in all.
        failed: results that are failures.
        front: rows of the journal that trained in full and that no other beats in every goal, by the first goal.
        best: the best row of those, or None at first.
        seconds_left: an estimate from what trials took, or None before the first.
    """

    plan: Plan
    done: int
    total: int
    failed: int
    front: list[Row]
    best: Row | None
    seconds_left: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        told = ("done", "total", "failed", "front", "best", "seconds_left")
        return {"plan": self.plan.to_json(), **{key: getattr(self, key) for key in told}}


def stand(rows: Iterable[Row]) -> Standing:
    """Return how the search stands whose journal has these rows.

    Raises:
        RecipeError: they are no journal of a search.
    """
    everything = list(rows)
    if not everything or "plan" not in everything[0]:
        raise RecipeError("there is no search in this journal: it does not begin with a plan")
    sessions = [row["session"] for row in everything if "session" in row]
    stored = {**everything[0]["plan"], **({"trials": sessions[-1]["trials"]} if sessions else {})}
    plan, results = Plan.from_json(stored), [row for row in everything if "recipe" in row]
    last = len(plan.rungs) - 1
    whole = [row for row in results if row["rung"] == last and "values" in row]
    points = [[row["values"][goal] for goal in plan.goals] for row in whole]
    best_first = sorted(whole, key=lambda row: (plan.merit(row["values"]), -row["trial"]), reverse=True)
    front = [row for row, (level, _) in zip(whole, ranks(points), strict=True) if level == 0]
    front.sort(key=lambda row: (row["values"][plan.goals[0]], row["trial"]))
    expected, left = 0, 0.0
    took = {rung: [row["seconds"] for row in results if row["rung"] == rung] for rung in range(last + 1)}
    known = next((rung for rung in range(last, -1, -1) if took[rung]), None)
    counts = _expected(plan)
    for rung, count in enumerate(counts):
        expected += count
        if known is not None:
            mean = (
                sum(took[rung]) / len(took[rung])
                if took[rung]
                else sum(took[known]) / len(took[known]) * plan.rungs[rung] / plan.rungs[known]
            )
            left += max(0, count - len(took[rung])) * mean
    workers = sessions[-1]["workers"] if sessions else 1
    complete = "finished" in everything[-1]
    return Standing(
        plan=plan,
        done=len(results),
        total=len(results) if complete else max(expected, len(results)),
        failed=sum("failed" in row for row in results),
        front=front,
        best=best_first[0] if best_first else None,
        seconds_left=None if known is None else 0.0 if complete else left / max(1, workers),
    )


def _expected(plan: Plan) -> list[int]:
    """How many results each rung will have, when none is hopeless or equal to another."""
    counts = [0] * len(plan.rungs)
    for first in range(0, plan.trials, plan.generation):
        size = min(plan.generation, plan.trials - first)
        for rung in range(len(plan.rungs)):
            counts[rung] += size
            size = math.ceil(size * _PROMOTED)
    return counts


def _key(recipe: Any, rung: int) -> str:
    return f"{rung} {json.dumps(recipe, sort_keys=True)}"
