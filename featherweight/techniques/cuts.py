"""From the units that groups keep to the Keep that cuts them together."""

from __future__ import annotations

from torch import nn

from featherweight.edits import Cut, Keep, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.sizes import following_sizes

Remaining = dict[tuple[str, int], list[int]]
Cluster = list[tuple[CoupledGroup, set[int]]]  # groups cut in one edit, each with the indices of the units it keeps


def keep_edit(model: nn.Module, cluster: Cluster, remaining: Remaining) -> tuple[Keep, Remaining]:
    """Return the Keep that leaves these units, and which original indices each dimension has left after it.

    Args:
        model: as it is now.
        cluster: groups that were found before any cut.
        remaining: the original indices still present where an earlier Keep has cut the same dimension.
    """
    tensors = named_tensors(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for group, kept in cluster:
        for index, unit in enumerate(group.units):
            if index not in kept:
                for member, owned in zip(group.members, unit, strict=True):
                    gone.setdefault(member, set()).update(owned)
    after: Remaining = {}
    cuts = []
    for (name, dim), lost in sorted(gone.items()):
        present = remaining.get((name, dim), list(range(tensors[name].shape[dim])))
        cuts.append(Cut(name, dim, tuple(place for place, index in enumerate(present) if index not in lost)))
        after[name, dim] = [index for index in present if index not in lost]
    return Keep(tuple(cuts), tuple(following_sizes(model, cuts))), after
