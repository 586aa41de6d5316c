"""How the damages of the families compare once healed, and the recipe that a strength becomes so.

Tables cannot know that: lost channels heal best, then ranks, then zeros, and the rounding to few bits least, but by how much
depends on the network. Trainings decide between a few mixes, and where they are quick between many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from featherweight.allocation import Allocation, Healing, Tables, closing_steps, recipe_of, solve
from featherweight.errors import BudgetError
from featherweight.search import MILDEST, Strength
from featherweight.technique import Recipe, Technique
from featherweight.techniques import Distill, FoldBatchNorm, PruneWeights, QuantizeWeights

Mix = Mapping[str, float]
MIXES: dict[str, Mix] = {
    "balanced": {"channels": 0.1, "ranks": 0.3, "rounding": 5.0},
    "narrow": {"channels": 0.03, "ranks": 1.0, "zeros": 0.3, "rounding": 5.0},
    "sparse": {"zeros": 0.01, "rounding": 2.0},
    "even": {},
    "channels": {"channels": 0.01, "ranks": 10.0, "zeros": 3.0, "rounding": 5.0},
    "pruned": {"channels": 0.1, "ranks": 10.0, "zeros": 0.03},
}
_BOX = {"channels": (0.003, 1.0), "ranks": (0.1, 10.0), "zeros": (0.01, 3.0), "rounding": (1.0, 20.0)}
UNIFORM = "uniform"
"""Name of the mix that is none."""
EVERY = len(MIXES) + 1
"""Trials that let all named mixes be compared, the uniform one among them."""
_SURVIVOR_BITS = 2.8  # entropy of a non-zero code of 4 bits, about
_TIE = 1.002


def drawn(count: int, seed: int) -> dict[str, Mix]:
    """Return mixes beside the named ones: the logarithms of their factors fill a box about those evenly (a Sobol sequence).

    Args:
        count: of mixes, 1 or more.
        seed: which of the sequences.
    """
    low, high = (torch.tensor(ends).log() for ends in zip(*_BOX.values(), strict=True))
    sequence = torch.quasirandom.SobolEngine(len(_BOX), scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    places = sequence.draw(count)
    factors = (low + places * (high - low)).exp().tolist()
    return {
        f"drawn-{number}": {name: float(f"{factor:.2g}") for name, factor in zip(_BOX, row, strict=True)}
        for number, row in enumerate(factors, 1)
    }


class Mixer:
    """Makes recipes of strengths and mixes; what differs in training alone is allocated once.

    Args:
        tables: of the prepared model.
        original: `size`, `params` and `macs` of the original, and `floor`, bytes of a file whose weights have no information.
    """

    def __init__(self, tables: Tables, original: dict[str, float]) -> None:
        self._tables, self._original = tables, original
        self._known: dict[tuple[Strength, tuple[tuple[str, float], ...]], Allocation] = {}

    def recipe(self, strength: Strength, mix: Mix | None, trains: bool) -> Recipe:
        """Return the recipe of a strength and mix.

        Args:
            strength: how small.
            mix: factors on the damages of families, as of `MIXES`; None is no allocation, one density by LAMP and one width.
            trains: False leaves every training out: what the file would weigh, without the wait.
        """
        healing = strength.healing if trains else Healing(0, 0)
        if mix is None:
            return _uniform(self._wanted(strength), self._tables, healing)
        key = (replace(strength, epochs=1, pace=1.0), tuple(mix.items()))
        if key not in self._known:
            self._known[key] = self._allocated(strength, mix)
        return recipe_of(self._tables, self._known[key], healing, strength.static)

    def _wanted(self, strength: Strength) -> float:
        """Bytes that the weights may take."""
        return self._original["size"] / strength.factor - self._original["floor"]

    def _allocated(self, strength: Strength, mix: Mix) -> Allocation:
        offered = self._tables.scaled(mix)
        if strength.static:
            offered = _only(offered, bits=(8,))  # what integer kernels compute
        elif math.isfinite(strength.seconds):
            offered = _only(offered)  # the tables' seconds are of whole matrices
        limits = {strength.metric: strength.share * self._original[strength.metric]} if strength.share < 1 else {}
        if math.isfinite(strength.seconds):
            limits["seconds"] = strength.seconds
        integers = strength.static and strength.factor <= MILDEST  # which are that small
        size = {} if integers else {"size": self._wanted(strength)}
        try:
            return solve(offered, {**limits, **size})
        except BudgetError:  # the closest: what a search makes of it is its own
            return _closest(offered, limits, "seconds" if "seconds" in limits else strength.metric)


def _closest(tables: Tables, limits: dict[str, float], metric: str) -> Allocation:
    try:
        return solve(tables, limits, "size")
    except BudgetError:
        least = solve(tables, {}, metric).costs[metric]
        return solve(tables, {metric: least * _TIE})  # many choices take as long: the least damage of them


def _only(tables: Tables, bits: tuple[int, ...] = ()) -> Tables:
    """The treatments without factors, and of these bits where any are given."""
    rows = (
        replace(row, treatments=tuple(one for one in row.treatments if not one.rank and (not bits or one.bits in bits)))
        for row in tables.rows
    )
    return replace(tables, rows=tuple(rows))


def _uniform(wanted: float, tables: Tables, healing: Healing) -> Recipe:
    """Fold, prune all weights by one ranking, round to 4 bits: as many zeros as the bytes ask for, by the codes' entropy."""
    steps: list[Technique] = [FoldBatchNorm()]
    weights = sum(row.treatments[0].params for row in tables.rows)
    ratio = _ratio(8 * wanted / max(1.0, weights))
    if ratio:
        steps.append(PruneWeights(ratio=ratio, epochs=healing.epochs, learning_rate=healing.rate))
    steps.append(QuantizeWeights(bits=4, per_channel=False))
    if healing.last:
        steps.append(Distill(epochs=healing.last, learning_rate=healing.last_rate))
    return Recipe((*steps, *closing_steps(tables.loose)))


def _ratio(wanted: float) -> float:
    """The share of weights to prune so that `wanted` bits a weight are enough, by the entropy of what is left."""

    def cost(density: float) -> float:
        empty = 1 - density
        address = -(density * math.log2(density) + empty * math.log2(empty)) if 0 < density < 1 else 0.0
        return address + density * _SURVIVOR_BITS

    low, high = 1e-4, 1.0
    if cost(high) <= wanted:
        return 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < wanted else (low, middle)
    return round(1 - low, 4)
