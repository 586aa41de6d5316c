"""A first simple search: how strong the default recipe must be, and may be, for a budget; validation data only.

Two strengths are chosen. The share of channels cut is the smallest whose untrained model meets the limits that need no
score (MACs, parameters, milliseconds, memory). The size factor starts where the untrained file meets the size limit;
each trial then trains in full, and while the validation score holds, the file is made smaller, else larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from featherweight.budget import Budget
from featherweight.scoring import Score
from featherweight.technique import Recipe, Technique
from featherweight.techniques import (
    Distill,
    FoldBatchNorm,
    PruneChannels,
    PruneWeights,
    QuantizeStatic,
    QuantizeWeights,
)

_CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SURVIVOR_BITS = {8: 7.0, 6: 5.2, 4: 2.8}  # entropy of a non-zero code, about
_GROW = 2.0
_CLOSE = 1.08  # stop when the factors that hold and fail are this near
_TIGHTEN = 1.03
_MILDEST = 4.0


@dataclass(frozen=True)
class Strength:
    """How hard the default recipe works.

    Attributes:
        cut: share of channels removed, 0 to 0.9.
        factor: how many times smaller than float32 the weights are to be, at least 4.
        epochs: of the gradual pruning; the heals around it take a half each.
        static: whether activations are quantized too, for speed.
    """

    cut: float
    factor: float
    epochs: int
    static: bool


def default_recipe(strength: Strength, trains: bool = True) -> Recipe:
    """Return the default recipe at a strength: fold, cut channels, prune weights, quantize, each healed by the teacher.

    Args:
        strength: how hard it works.
        trains: False leaves every training step out: what the file would weigh, without the wait.
    """
    bits = 8 if strength.static or strength.factor <= 4.5 else 6 if strength.factor <= 8 else 4
    ratio = _ratio(strength, bits)
    heal = max(1, strength.epochs // 2)
    steps: list[Technique] = [FoldBatchNorm()]
    if strength.cut:
        steps.append(PruneChannels(ratio=strength.cut))
        steps += [Distill(epochs=heal)] if trains else []
    if ratio:
        steps.append(PruneWeights(ratio=ratio, epochs=strength.epochs if trains else 0, learning_rate=2e-3))
    if strength.static:
        steps.append(QuantizeStatic())
    else:
        steps.append(QuantizeWeights(bits=bits, per_channel=bits > 4))
    if trains:
        steps.append(Distill(epochs=heal, learning_rate=5e-4))
    return Recipe(tuple(steps))


def _ratio(strength: Strength, bits: int) -> float:
    """The share of weights to prune so that `32 / factor` bits a weight are enough, by the entropy of what is left."""
    left = (1 - strength.cut) ** 2
    wanted = 32 / (strength.factor * left)

    def cost(density: float) -> float:
        empty = 1 - density
        address = -(density * math.log2(density) + empty * math.log2(empty)) if 0 < density < 1 else 0.0
        return address + density * _SURVIVOR_BITS[bits]

    low, high = 1e-4, 1.0
    if cost(high) <= wanted:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < wanted else (low, middle)
    return round(1 - low, 4)


@dataclass(frozen=True)
class Trial:
    """One fully trained candidate.

    Attributes:
        strength: what was tried.
        recipe: the recipe it stands for.
        size_bytes: of its file.
        score: on validation data.
        drop: against the original, and one standard error of it.
        fits: whether the size limit is met.
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
        """Whether both limits are met."""
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


def search(
    budget: Budget, original: dict[str, float], cheap: Cheap, full: Full, epochs: int, trials: int
) -> list[Trial]:
    """Return the trials made, the best one last.

    The best is the smallest that holds when the budget limits the drop, else the one with the best score that holds;
    when none holds, the one that comes closest.

    Args:
        budget: what to meet.
        original: the original's costs, for relative limits.
        cheap: costs of a candidate without training.
        full: trains and scores a candidate.
        epochs: of the gradual pruning in each trial.
        trials: most candidates to train.
    """
    static = budget.limit("latency") is not None
    cut = _smallest_cut(budget, original, cheap, epochs, static)
    size, drop = budget.limit("size"), budget.limit("drop")
    start = Strength(cut, _MILDEST, epochs, static)
    if size is not None:
        start = _smallest_factor(start, size.allowed(original["size"]), cheap)
    elif drop is not None and not static:
        start = Strength(cut, 8.0, epochs, static)
    made: list[Trial] = []
    allowed = size.allowed(original["size"]) if size is not None else math.inf
    for strength in _strengths(start, made, drop is not None, allowed):
        made.append(full(strength))
        if len(made) >= trials:
            break
    return sorted(made, key=lambda trial: _merit(trial, drop is not None))


def _merit(trial: Trial, smaller: bool) -> tuple[float, ...]:
    """What orders trials, the best last: those that hold, then those small enough by score, then the rest by size."""
    score = trial.score.value if trial.score.higher_is_better else -trial.score.value
    if trial.holds:
        return (2.0, -float(trial.size_bytes), score) if smaller else (2.0, score, -float(trial.size_bytes))
    return (1.0, score) if trial.fits else (0.0, -float(trial.size_bytes))


def _strengths(start: Strength, made: list[Trial], limits_drop: bool, allowed: float) -> Iterator[Strength]:
    """Yield the strength to try next, judging by the last trial in `made`.

    A file that is too large is tightened by what it was over. One that holds is made smaller, if the drop has a limit, until
    one fails; then the search goes between the two. One that is small enough and too inaccurate trains twice as long once,
    and then, where the size leaves room, gets milder.
    """
    factor, epochs = start.factor, start.epochs
    held, failed = 0.0, math.inf
    while True:
        yield Strength(start.cut, round(factor, 2), epochs, start.static)
        last = made[-1]
        if not last.fits:
            factor *= max(_TIGHTEN, _TIGHTEN * last.size_bytes / allowed)
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
            elif epochs == start.epochs:
                epochs *= 2
            elif math.isinf(allowed) and factor > _MILDEST:
                factor = max(_MILDEST, factor / _GROW)
            else:
                return


def _smallest_cut(budget: Budget, original: dict[str, float], cheap: Cheap, epochs: int, static: bool) -> float:
    limits = [limit for name in ("params", "macs", "latency", "memory") if (limit := budget.limit(name)) is not None]
    if not limits:
        return 0.0
    low, high = 0, len(_CUTS) - 1
    while low < high:  # costs fall with the cut
        middle = (low + high) // 2
        costs = cheap(Strength(_CUTS[middle], 4.0, epochs, static))
        fits = all(costs[limit.metric] <= limit.allowed(original[limit.metric]) for limit in limits)
        low, high = (low, middle) if fits else (middle + 1, high)
    return _CUTS[low]


def _smallest_factor(start: Strength, allowed: float, cheap: Cheap) -> Strength:
    """The mildest factor whose untrained file is small enough; the strongest tried when none is."""
    factor = start.factor
    for _ in range(24):
        strength = Strength(start.cut, round(factor, 2), start.epochs, start.static)
        size = cheap(strength)["size"]
        if size <= allowed:
            return strength
        factor *= min(2.0, max(1.05, size / allowed))
    return strength
