"""Which groups are cut together, and from the units that they keep to the Keep that does it."""

from __future__ import annotations

from torch import nn

from featherweight.data import as_call, example_inputs
from featherweight.edits import Cut, Keep, named_tensors
from featherweight.errors import ModelError
from featherweight.graph import CoupledGroup, Pinned, coupled_groups
from featherweight.sizes import following_sizes
from featherweight.technique import Context
from featherweight.techniques.importance import digest, within

Remaining = dict[tuple[str, int], list[int]]
Cluster = list[tuple[CoupledGroup, set[int]]]  # groups cut in one edit, each with the indices of the units it keeps


def coupled(model: nn.Module, context: Context, attention: str = "heads") -> tuple[list[CoupledGroup], list[Pinned]]:
    """Return the coupled groups of a model, and what is pinned; a model that cannot be traced has none, and the notes say so.

    Trials on the same weights trace once: the context's memory keeps the result.

    Args:
        model: it comes back as it was.
        context: example, device and memory.
        attention: as of `coupled_groups`.
    """
    known = ("coupled", attention, str(model), tuple(named_tensors(model)), digest(model))
    if known not in context.memory:
        args, kwargs = as_call(example_inputs(context.data, context.device))
        try:
            context.memory[known] = coupled_groups(model, args, kwargs, attention)
        except ModelError as error:
            context.leave("", str(error))
            return [], []
    groups, pinned = context.memory[known]
    return list(groups), list(pinned)


def clusters(model: nn.Module, context: Context) -> list[list[CoupledGroup]]:
    """Return the groups in scope that are cut together: those that must stay as large as each other, and the others alone.

    A model that cannot be traced has none, and the context's notes say so.

    Args:
        model: it comes back as it was.
        context: example, scope and device.
    """
    alike: dict[str | int, list[CoupledGroup]] = {}
    for place, group in enumerate(coupled(model, context)[0]):
        alike.setdefault(group.size or place, []).append(group)
    return [
        groups
        for groups in alike.values()
        if min(map(len, groups)) > 1 and all(within(model, group, context) for group in groups)
    ]


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
