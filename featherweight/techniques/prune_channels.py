"""Structured pruning: remove whole channels, with everything that is coupled to them."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Edit, Write, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.technique import Context, Edits, Stage, Technique, Untouched, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.cuts import Cluster, Remaining, coupled, keep_edit
from featherweight.techniques.importance import FROM_DATA, KINDS, importance, within
from featherweight.techniques.reconstruction import reconstructed
from featherweight.techniques.unit_costs import unit_macs


@final
@dataclass(frozen=True)
class PruneChannels(Technique):
    """Remove a share `ratio` of the channels of the coupled groups, the least important first, physically.

    What leaves with a channel is followed through residual adds, flatten, depthwise convolution, normalization, attention
    and recurrent layers, and its importance is that of everything that leaves. `ranking` says what share each group loses:
    the same (`group`), by one threshold over all units (`global`), by one for each set of groups of the same shapes
    (`isomorphic`), or by one over all on the importance for each multiply-add saved (`macs`). Where kernels compute `multiple`
    channels at a time, so many are ranked as one, as only whole blocks save time. With `reconstruct`, the layers behind a cut
    are refitted to their old outputs on calibration data.
    Groups that cannot be followed are left whole, and the report says what stopped them.

    Paper: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; coupled groups: Fang et al., "DepGraph", CVPR 2023;
        isomorphic ranking: Fang et al., ECCV 2024; blocks: Shen et al., HALP, NeurIPS
        2022; reconstruction: He et al., "Channel Pruning", ICCV 2017.
    Use when: time, memory and bytes all matter: what remains is a smaller dense network, faster everywhere.
    Costs: one trace, and a pass over `batches` calibration batches for importances from data and for each reconstruction;
        heal with `distill` afterwards.
    """

    stage: ClassVar[Stage | None] = Stage.CUT
    ratio: float = setting(0.5, low=0.0, high=0.99)
    importance: str = setting("l2", choices=KINDS)
    ranking: str = setting("group", choices=("group", "global", "isomorphic", "macs"))
    multiple: int = setting(1, low=1, high=512)
    minimum: int = setting(2, low=1, high=100_000)
    attention: str = setting("heads", choices=("heads", "width"))
    reconstruct: bool = setting(False)
    batches: int = setting(16, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Calibration data for importances that are read from it, and for reconstruction."""
        return frozenset({"calibrate"}) if self.reconstruct or self.importance in FROM_DATA else frozenset()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Keep for each set of coupled groups in scope that must be cut together, and a Write after it to refit."""
        if self.ratio:
            yield from layer_swaps(model, context)
        groups, pinned = coupled(model, context, self.attention)
        for pin in pinned:
            if context.in_scope(pin.tensor.rpartition(".")[0]):
                context.leave(pin.tensor.rpartition(".")[0], pin.reason)
        inside = _inside(model, groups, context)
        scores = importance(model, inside, self.importance, context, self.batches)
        if self.ranking == "macs":
            scores = [score / macs for score, macs in zip(scores, unit_macs(model, inside, context), strict=True)]
        remaining: Remaining = {}
        refused: list[tuple[Cluster, Untouched]] = []
        for cluster in self._choose(inside, scores, named_tensors(model)):
            if not (yield from self._cut(model, context, cluster, remaining)):
                refused.append((cluster, context.untouched[-1]))
        by_group = dict(zip(map(id, inside), scores, strict=True))
        for alike in _adjacent(refused):
            if (yield from self._cut(model, context, _in_proportion(alike, by_group), remaining)):
                context.untouched[:] = [note for note in context.untouched if all(note is not own for _, own in alike)]

    def _cut(
        self, model: nn.Module, context: Context, cluster: Cluster, remaining: Remaining
    ) -> Generator[Edit, bool, bool]:
        """Yield the Keep of one cluster, and the Write that refits what reads it; return whether it stayed."""
        if all(len(kept) == len(group) for group, kept in cluster):
            return True
        keep, after = keep_edit(model, cluster, remaining)
        refit = reconstructed(model, context, keep, self.batches) if self.reconstruct else {}
        kept = yield keep
        if kept:
            remaining.update(after)
            if refit:
                yield Write(refit)
        return kept

    def _choose(
        self, groups: Sequence[CoupledGroup], scores: Sequence[Tensor], tensors: dict[str, Tensor]
    ) -> list[Cluster]:
        """The indices of the units that each group keeps, in clusters of groups that are cut together."""
        counts = self._counts(groups, scores, tensors)
        clusters: dict[str | int, list[int]] = {}
        for place, group in enumerate(groups):
            clusters.setdefault(group.size or place, []).append(place)
        chosen = []
        for places in clusters.values():
            smallest = min(len(groups[place]) for place in places)
            wide = min(_width(groups[place]) for place in places)
            least = math.ceil(self.minimum / wide)  # a head is several channels
            count = min(smallest, max(least, round(sum(counts[place] for place in places) / len(places))))
            if self.multiple > 1:
                count = min(smallest, max(self.multiple, round(count / self.multiple) * self.multiple))
            best = [scores[place].argsort(descending=True, stable=True)[:count].tolist() for place in places]
            chosen.append([(groups[place], set(kept)) for place, kept in zip(places, best, strict=True)])
        return chosen

    def _counts(
        self, groups: Sequence[CoupledGroup], scores: Sequence[Tensor], tensors: dict[str, Tensor]
    ) -> list[int]:
        """How many units each group would keep by itself."""
        rivals: dict[object, list[int]] = {}
        for place, group in enumerate(groups):
            alike = {"group": place, "isomorphic": _form(group, tensors)}.get(self.ranking, 0)
            rivals.setdefault(alike, []).append(place)
        counts = [0] * len(groups)
        for places in rivals.values():
            together = torch.cat([_of_blocks(scores[place], self.multiple) for place in places])
            owner = torch.cat([torch.full((len(groups[place]),), place) for place in places])
            kept = owner[together.argsort(descending=True, stable=True)[: round(len(together) * (1 - self.ratio))]]
            for place in places:
                counts[place] = int((kept == place).sum())
        return counts

    def mildest(self) -> Technique:
        """Return a cut that keeps every channel."""
        return PruneChannels(ratio=0.0)


def _inside(model: nn.Module, groups: Sequence[CoupledGroup], context: Context) -> list[CoupledGroup]:
    """The groups whose outputs are all in scope, and with them those of the groups that must stay as large."""
    inside = [group for group in groups if within(model, group, context)]
    split = {group.size for group in groups if group.size and group not in inside}
    return [group for group in inside if group.size not in split]


def _width(group: CoupledGroup) -> int:
    """How many output channels one unit is: more than one for a head."""
    outputs = zip(group.members, group.units[0], strict=True)
    return min((len(owned) for (_, dim), owned in outputs if dim == 0), default=1)


def _of_blocks(scores: Tensor, multiple: int) -> Tensor:
    """Every unit's score as the mean of the `multiple` units that it leaves with, the most important units first."""
    blocks = torch.split(scores.sort(descending=True).values, multiple)
    return torch.cat([block.mean().expand(len(block)) for block in blocks])


def _form(group: CoupledGroup, tensors: dict[str, Tensor]) -> tuple[object, ...]:
    """What groups of equal structure have in common: the shapes of their members and where they are cut."""
    kinds = [(name.rpartition(".")[2], tuple(tensors[name].shape), dim) for name, dim in group.members]
    return (len(group), *sorted(kinds))


def _adjacent(refused: Sequence[tuple[Cluster, Untouched]]) -> list[list[tuple[Cluster, Untouched]]]:
    """Refused clusters that touch the same layers, several at a time.

    A forward may need two of them at once: `reshape(batch, steps, width)` behind attention makes the width of all heads
    that of the residual stream.
    """
    found: list[tuple[set[str], list[tuple[Cluster, Untouched]]]] = []
    for item in refused:
        layers = {name.rpartition(".")[0] for group, _ in item[0] for name, _ in group.members}
        touching = [entry for entry in found if entry[0] & layers]
        found = [entry for entry in found if not entry[0] & layers]
        found.append(
            (layers.union(*(own for own, _ in touching)), [i for _, items in touching for i in items] + [item])
        )
    return [items for _, items in found if len(items) > 1]


def _in_proportion(refused: Sequence[tuple[Cluster, Untouched]], scores: dict[int, Tensor]) -> Cluster:
    """One cluster of all, every group keeping the share that the one with the fewest units keeps."""
    parts = [part for cluster, _ in refused for part in cluster]
    coarsest, kept = min(parts, key=lambda part: len(part[0]))
    share = len(kept) / len(coarsest)
    return [
        (group, set(scores[id(group)].argsort(descending=True, stable=True)[: round(share * len(group))].tolist()))
        for group, _ in parts
    ]
