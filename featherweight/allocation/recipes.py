"""An allocation as an explicit recipe: cut, factor, prune, quantize, each where the program says, healed by the teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featherweight.allocation.program import Allocation
from featherweight.allocation.treatments import Row, Tables
from featherweight.scoping import only
from featherweight.technique import Recipe, Technique
from featherweight.techniques import (
    Distill,
    FoldBatchNorm,
    LowRank,
    PruneChannels,
    PruneWeights,
    QuantizeStatic,
    QuantizeWeights,
    RoundParameters,
    SplitLayers,
)
from featherweight.techniques.low_rank import like_a_head
from featherweight.techniques.recurrent import inner_names

_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")
PREPARED = Recipe((FoldBatchNorm(), SplitLayers()))
"""What tables are made after."""


@dataclass(frozen=True)
class Healing:
    """How long an allocation is healed; every mix is healed alike.

    Attributes:
        epochs: after cuts and factors, while weights are pruned; 0 leaves all training out.
        last: after quantization.
        rate: learning rate of the first.
        last_rate: of the second.
    """

    epochs: int
    last: int
    rate: float = 2e-3
    last_rate: float = 1e-3

    @classmethod
    def of(cls, epochs: int, pace: float = 1.0) -> Healing:
        """Return so many epochs and, after quantization, half as many, at least 1; `pace` is a factor on the usual rates."""
        return cls(epochs, max(1, epochs // 2), cls.rate * pace, cls.last_rate * pace)

    @property
    def total(self) -> int:
        """Epochs in all."""
        return self.epochs + self.last


def recipe_of(
    tables: Tables, allocation: Allocation, healing: Healing, static: bool = False, batches: int = 8
) -> Recipe:
    """Return the steps that carry an allocation out, from the original model on.

    Args:
        tables: of the prepared model.
        allocation: what to do.
        healing: how long to train.
        static: whether activations become integers too, for speed; all weights then have 8 bits.
        batches: calibration batches that cuts and factors read.
    """
    steps: list[Technique] = [FoldBatchNorm(), *([SplitLayers()] if tables.split else [])]
    steps += _cuts(tables, allocation, batches)
    steps += _factors(tables, allocation, batches)
    ratios = ", ".join(
        f"{row.name} {round(1 - allocation.treatments[row.name].density, 4):g}"
        for row in tables.rows
        if allocation.treatments[row.name].density < 1
    )
    if ratios:
        steps.append(PruneWeights(ratios=ratios, epochs=healing.epochs, learning_rate=healing.rate))
    elif healing.epochs:
        steps.append(Distill(epochs=healing.epochs, learning_rate=healing.rate))
    steps += [QuantizeStatic()] if static else _widths(tables, allocation)
    if healing.last:
        steps.append(Distill(epochs=healing.last, learning_rate=healing.last_rate))
    return Recipe((*steps, *closing_steps(tables.loose)))


def closing_steps(loose: bool) -> list[Technique]:
    """Return what follows all training: where there are parameters that no layer holds, they are rounded."""
    return [RoundParameters()] if loose else []


def _cuts(tables: Tables, allocation: Allocation, batches: int) -> list[Technique]:
    """One step for each share: the layers behind a cut are refitted to their old outputs."""
    alike: dict[float, list[str]] = {}
    for group, share in zip(tables.groups, allocation.shares, strict=True):
        if share < 1:
            alike.setdefault(share, []).extend(group.names)
    return [
        _narrowed(paths, PruneChannels(ratio=round(1 - share, 4), importance="obs", reconstruct=True, batches=batches))
        for share, paths in sorted(alike.items(), reverse=True)
    ]


def _factors(tables: Tables, allocation: Allocation, batches: int) -> list[Technique]:
    """One step for each ratio of parameters that goes, and for each layer that `low_rank` may leave dense if others are with it."""
    alike: dict[tuple[float, str], list[str]] = {}
    for row in tables.rows:
        rank = allocation.treatments[row.name].rank
        if rank:
            alone = row.path if like_a_head(*row.shape) else ""
            alike.setdefault((_ratio(row, rank, allocation.shares), alone), []).append(row.path)
    return [
        _narrowed(paths, LowRank(rank="ratio", ratio=ratio, method="whitened", batches=batches))
        for (ratio, _), paths in sorted(alike.items())
        if ratio > 0
    ]


def _ratio(row: Row, rank: int, shares: Sequence[float]) -> float:
    """The share of a layer's parameters that goes when its matrix, as it is after the cuts, gets this rank."""
    out = row.shape[0] * (shares[row.makes] if row.makes >= 0 else 1.0)
    inside = math.prod(row.shape[1:]) * (shares[row.reads] if row.reads >= 0 else 1.0)
    # half a rank more, so that rounded sizes of cut layers cannot cost one; the bias stays
    return round(min(0.99, 1 - ((rank + 0.5) * (out + inside) + out) / (out * inside + out)), 3)


def _widths(tables: Tables, allocation: Allocation) -> list[Technique]:
    """One step for each width, and one for each recurrent layer whose matrices have several."""
    held: dict[str, dict[str, int]] = {}
    for row in tables.rows:
        held.setdefault(row.path, {})[row.name] = allocation.treatments[row.name].bits
    alike: dict[tuple[int, str], list[str]] = {}
    for path, own in held.items():
        alike.setdefault((max(own.values()), _apart(path, own)), []).append(path)
    if len(alike) == 1:
        ((bits, several),) = alike
        return [QuantizeWeights(bits=bits, per_channel=False, widths=several)]
    return [
        _narrowed(paths, QuantizeWeights(bits=bits, per_channel=False, widths=several))
        for (bits, several), paths in sorted(alike.items())
    ]


def _apart(path: str, bits: Mapping[str, int]) -> str:
    """The widths of a recurrent layer's matrices, where they differ, by the paths that they get once it is taken apart."""
    prefix = f"{path}." if path else ""
    own = [name.removeprefix(prefix) for name in bits]
    if len(set(bits.values())) == 1 or not all(map(_RECURRENT.fullmatch, own)):
        return ""
    names = inner_names(own)
    return ", ".join(f"{prefix}{inner.rpartition('.')[0]} {bits[prefix + name]}" for inner, name in names.items())


def _narrowed(paths: Sequence[str], step: Technique) -> Technique:
    """The step on these layers alone; a model that is one layer has no path to name."""
    return only(tuple(paths), step) if all(paths) else step
