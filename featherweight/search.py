"""What a budget asks of the integer program, and how strong the next trial should be; validation data only.

A strength says how small: the share of multiply-adds or parameters left is the largest whose untrained model meets the
limits on MACs, parameters and memory. The seconds that the program may spend by the tables, and the size factor, start at
the limits and are corrected by what the untrained model and its file measure, until both keep them. Each trial then trains as
long as it needs, and while the validation score holds, the file is made smaller, else larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from featherweight.allocation import Healing
from featherweight.budget import Budget
from featherweight.scoring import Score
from featherweight.technique import Recipe

SHORT = 16
"""How many times shorter than a trial the first trainings are that compare mixes, and that a mild trial makes do with."""
ROOM = 0.995
"""Of a limited size, what a file is resized to; further training changes it a little."""
FULL = 0.96
"""Of a limited size: a file that leaves more is made larger, where that takes little time."""
_SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.22, 0.16, 0.1, 0.06, 0.03)
_GROW = 2.0
_CLOSE = 1.08  # stop when the factors that hold and fail are this near
_TIGHTEN = 1.01
MILDEST = 4.0
"""Times smaller than float32 that the weakest strength is: what integers of 8 bits are."""
_CORRECTIONS = 24
_AIM = 0.94  # of the seconds allowed, that the tables may add up to: additions are a few percent off
_CLOCK = 0.97  # of the seconds allowed, that a candidate may measure: the verdict measures anew


@dataclass(frozen=True)
class Strength:
    """How hard the mix works.

    Attributes:
        share: most multiply-adds or parameters left, above 0, up to 1.
        factor: how many times smaller than float32 the file is to be, at least 4.
        epochs: after cuts, while weights are pruned; a half more follow quantization.
        static: whether activations are quantized too, for speed.
        metric: `macs` or `params`, which of them `share` is of.
        seconds: most that the program may spend by the tables.
        pace: of training: a factor on the usual learning rates.
    """

    share: float
    factor: float
    epochs: int
    static: bool
    metric: str = "macs"
    seconds: float = math.inf
    pace: float = 1.0

    @property
    def healing(self) -> Healing:
        """How long and how fast a mix is trained."""
        return Healing.of(self.epochs, self.pace)

    def shorter(self, times: int = SHORT) -> Strength:
        """Return a strength with so many times less training, at least an epoch."""
        return replace(self, epochs=max(1, self.epochs // times))

    def resized(self, size: float, allowed: float, original: dict[str, float]) -> Strength:
        """Return the strength at which a file has the bytes allowed: what it has above the floor grows or shrinks in proportion.

        Args:
            size: bytes of its file at this strength.
            allowed: that it is to have.
            original: as of `Mixer`.
        """
        floor = original.get("floor", 0.0)
        wanted, above = original["size"] / self.factor - floor, size - floor
        if min(wanted, above, allowed - floor) > 0:
            factor = original["size"] / (wanted * (allowed - floor) / above + floor)
        else:
            factor = self.factor * size / allowed
        return replace(self, factor=round(max(MILDEST, factor), 2))

    def faster(self, measured: float, allowed: float) -> Strength:
        """Return the strength as it is where a candidate's seconds keep the limit, else with fewer of the tables' by as much.

        Args:
            measured: seconds of the untrained candidate.
            allowed: by the budget.
        """
        over = measured / (_CLOCK * allowed)
        return self if over <= 1 else replace(self, seconds=self.seconds * _AIM / over)


@dataclass(frozen=True)
class Trial:
    """One trained candidate.

    Attributes:
        strength: what was tried.
        recipe: what that came to.
        size_bytes: of its file.
        score: on validation data.
        drop: against the original, and one standard error of it.
        fits: whether the limits on size and latency are met.
        good: whether the drop limit is met, with the margin for its uncertainty.
        seconds: it took.
    """

    strength: Strength
    recipe: Recipe
    size_bytes: int
    score: Score
    drop: float
    drop_error: float
    fits: bool
    good: bool
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether these limits are met."""
        return self.fits and self.good

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {
            "recipe": str(self.recipe),
            "size_bytes": self.size_bytes,
            "score": self.score.value,
            "drop": self.drop,
            "met": self.holds,
            "seconds": self.seconds,
        }


Cheap = Callable[[Strength], dict[str, float]]
"""The costs of the untrained candidate: `size`, `params`, `macs`, and `latency` and `memory` where the budget asks."""
Full = Callable[[Strength], Trial]


def search(budget: Budget, original: dict[str, float], start: Strength, full: Full, trials: int) -> list[Trial]:
    """Return the trials made, the best one last.

    The best is the smallest that holds when the budget limits the drop, else the one with the best score that holds;
    when none holds, the one that comes closest.

    Args:
        budget: what to meet.
        original: the original's costs, for relative limits.
        start: as of `first_strength`.
        full: trains and scores a candidate, as long as it needs.
        trials: most candidates to train.
    """
    drop, size = budget.limit("drop"), budget.limit("size")
    made: list[Trial] = []
    allowed = size.allowed(original["size"]) if size is not None else math.inf
    for strength in _strengths(start, made, drop is not None, allowed, original):
        made.append(full(strength))
        if len(made) >= trials:
            break
    return sorted(made, key=lambda trial: _merit(trial, drop is not None))


def first_strength(
    budget: Budget, original: dict[str, float], cheap: Cheap, epochs: int, integers: bool = True
) -> Strength:
    """Return the mildest strength whose untrained candidate meets the limits that need no score; the strongest if none does.

    Args:
        budget: what to meet.
        original: the original's costs.
        cheap: costs of a candidate without training.
        epochs: of a trial.
        integers: whether activations are quantized too where a latency is limited.
    """
    static = integers and budget.limit("latency") is not None
    start = _largest_share(budget, original, cheap, Strength(1.0, MILDEST, epochs, static))
    size, drop, latency = (budget.limit(name) for name in ("size", "drop", "latency"))
    allowed: dict[str, float] = {}
    if latency is not None:
        allowed["latency"] = latency.allowed(original["latency"])
        start = replace(start, seconds=_AIM * allowed["latency"])
    if size is not None:
        allowed["size"] = size.allowed(original["size"])
        start = replace(start, factor=round(max(MILDEST, original["size"] / allowed["size"]), 2))
    elif drop is not None and not start.static:
        start = replace(start, factor=8.0)
    return _corrected(start, allowed, cheap, original) if allowed else start


def _merit(trial: Trial, smaller: bool) -> tuple[float, ...]:
    """What orders trials, the best last: those that hold, then those small enough by score, then the rest by size."""
    score = trial.score.value if trial.score.higher_is_better else -trial.score.value
    if trial.holds:
        return (2.0, -float(trial.size_bytes), score) if smaller else (2.0, score, -float(trial.size_bytes))
    return (1.0, score) if trial.fits else (0.0, -float(trial.size_bytes))


def _strengths(
    start: Strength, made: list[Trial], limits_drop: bool, allowed: float, original: dict[str, float]
) -> Iterator[Strength]:
    """Yield the strength to try next, judging by the last trial in `made`.

    A file that is too large is tightened by what it was over. One that holds is made smaller, if the drop has a limit, until
    one fails; then the search goes between the two. One that is small enough and too inaccurate trains twice as long once, if it
    trains at all, and then, where the size leaves room, gets milder.
    """
    factor, epochs = start.factor, start.epochs
    held, failed = 0.0, math.inf
    while True:
        yield replace(start, factor=round(factor, 2), epochs=epochs)
        last = made[-1]
        factor = last.strength.factor
        if not last.fits:
            if last.size_bytes <= allowed:  # it is too slow, as fast as can be
                return
            factor = max(_TIGHTEN * factor, last.strength.resized(last.size_bytes, ROOM * allowed, original).factor)
            if factor >= failed:
                return
        elif last.good:
            held = factor
            failed = failed if failed > held else math.inf  # a longer training holds where a shorter one failed
            if not limits_drop or failed / held < _CLOSE:
                return
            factor = held * _GROW if math.isinf(failed) else math.sqrt(held * failed)
        else:
            failed = min(failed, factor)
            if held:
                if failed / held < _CLOSE:
                    return
                factor = math.sqrt(held * failed)
            elif 0 < epochs == start.epochs:
                epochs *= 2
            elif math.isinf(allowed) and factor > MILDEST:
                factor = max(MILDEST, factor / _GROW)
            else:
                return


def _largest_share(budget: Budget, original: dict[str, float], cheap: Cheap, start: Strength) -> Strength:
    """The start with the largest share whose untrained model meets what needs no score."""
    limits = [limit for name in ("params", "macs", "memory") if (limit := budget.limit(name)) is not None]
    metric = "params" if [limit.metric for limit in limits] == ["params"] else "macs"
    start = replace(start, metric=metric)
    if not limits:
        return start
    low, high = 0, len(_SHARES) - 1
    while low < high:  # costs fall with the share
        middle = (low + high) // 2
        costs = cheap(replace(start, share=_SHARES[middle]))
        fits = all(costs[limit.metric] <= limit.allowed(original[limit.metric]) for limit in limits)
        low, high = (low, middle) if fits else (middle + 1, high)
    return replace(start, share=_SHARES[low])


def _corrected(start: Strength, allowed: dict[str, float], cheap: Cheap, original: dict[str, float]) -> Strength:
    """The mildest strength whose untrained candidate is small and fast enough; the strongest tried when none is."""
    strength = start
    before: dict[str, float] = {}
    for _ in range(_CORRECTIONS):
        costs = cheap(strength)
        over = costs["size"] / allowed["size"] if "size" in allowed else 0.0
        faster = strength.faster(costs["latency"], allowed["latency"]) if "latency" in allowed else strength
        if over <= 1 and (faster == strength or costs == before):  # nothing is left that would be faster
            return strength
        if over > 1:
            factor = strength.resized(costs["size"], allowed["size"], original).factor
            faster = replace(
                faster, factor=round(min(_GROW * strength.factor, max(_TIGHTEN * strength.factor, factor)), 2)
            )
        strength, before = faster, costs
    return strength
