"""Remove what unstructured pruning has left without a reader: channels and hidden units that no weight looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.data import Inputs, example_inputs, forward, tensors
from featherweight.edits import Keep, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.masking import masked
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Stage, Technique
from featherweight.techniques.cuts import Cluster, Remaining, coupled, keep_edit
from featherweight.techniques.importance import indices, makes, within

_TOLERANCE = 1e-5  # of the largest output, for sums in another order


@final
@dataclass(frozen=True)
class PruneDeadUnits(Technique):
    """Cut every unit whose readers have nothing but zeros for it; what the model computes stays the same.

    A unit that only dead units read is dead too. Its weights, biases and statistics leave the file, and time is saved as by
    `prune_channels`. Where a normalization takes its statistics over such units, they still count and stay.

    Paper: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
    Use when: after unstructured pruning of 90 % or more, before quantization.
    Costs: one trace.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Keep for each set of coupled groups that has dead units."""
        inputs = example_inputs(context.data, context.device)
        groups, _ = coupled(model, context)
        inside = [group for group in groups if within(model, group, context)]
        remaining: Remaining = {}
        for cluster in _clusters(inside, dead_units(model, inside)):
            keep, after = keep_edit(model, cluster, remaining)
            if not _unchanged(model, keep, inputs):
                context.leave(cluster[0][0].name, "units that nothing reads still count in the statistics over them")
            elif (yield keep):
                remaining.update(after)

    def mildest(self) -> Technique:
        """Return the technique itself: it has no strength."""
        return self


def dead_units(model: nn.Module, groups: Sequence[CoupledGroup]) -> list[set[int]]:
    """Return the dead units of each group: those that have readers, all of whose weights for them are zero.

    Args:
        model: as it is.
        groups: of this model.
    """
    values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named_tensors(model).items()}
    dead: list[set[int]] = [set() for _ in groups]
    found = True
    while found:
        found = False
        for group, gone in zip(groups, dead, strict=True):
            new = _unread(model, group, values) - gone
            for unit in new:
                for (name, dim), owned in zip(group.members, group.units[unit], strict=True):
                    values[name].index_fill_(dim, torch.tensor(owned), 0)
            gone |= new
            found = found or bool(new)
    return dead


def _unread(model: nn.Module, group: CoupledGroup, values: dict[str, Tensor]) -> set[int]:
    """The units whose readers have zeros alone, at most all but one of the group."""
    read = torch.zeros(len(group), dtype=torch.bool)
    readers = 0
    for (name, dim), owned in zip(group.members, indices(group), strict=True):
        if values[name].dim() >= 2 and not makes(model, name, dim):
            readers += 1
            used = (values[name] != 0).movedim(dim, 0).flatten(1).any(1)
            read |= used[owned].any(1)
    if not readers:
        return set()
    unread = set(torch.nonzero(~read).flatten().tolist())
    return unread if len(unread) < len(group) else unread - {0}


def _clusters(groups: Sequence[CoupledGroup], dead: Sequence[set[int]]) -> list[Cluster]:
    """The groups that lose units, those that must stay as large as each other together and by the same number."""
    together: dict[str | int, list[int]] = {}
    for place, group in enumerate(groups):
        together.setdefault(group.size or place, []).append(place)
    found: list[Cluster] = []
    for places in together.values():
        count = min(len(dead[place]) for place in places)
        if count:
            gone = [set(sorted(dead[place])[:count]) for place in places]
            found.append([(groups[p], set(range(len(groups[p]))) - lost) for p, lost in zip(places, gone, strict=True)])
    return found


def _unchanged(model: nn.Module, keep: Keep, inputs: Inputs) -> bool:
    with evaluating(model):
        before = list(tensors(forward(model, inputs)))
        with masked(model, keep):
            after = list(tensors(forward(model, inputs)))
    return all(
        float((a - b).abs().max()) <= _TOLERANCE * max(1.0, float(a.abs().max()))
        for a, b in zip(before, after, strict=True)
    )
