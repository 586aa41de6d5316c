"""Which slices of which parameters must be removed together, read from one trace of the model.

The model is exported once; labels are pushed through the exported graph by the rules of `operators.py`, which say which
indices of which parameters and buffers leave together. Components of that relation are the units of a coupled group.
The idea of a coupled group: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from featherweight.errors import ModelError
from featherweight.graph.atoms import Atoms
from featherweight.graph.walk import tensors_of, walk
from featherweight.modes import evaluating
from featherweight.trace import trace


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that may be removed one unit at a time.

    Attributes:
        members: `(tensor name, dimension)` of every slice a unit takes with it, sorted.
        units: `units[u][m]` are the indices of `members[m]` that unit `u` owns; a linear layer behind a flatten has
            height * width of them for each channel, a query projection one for each position of a head.
        name: path of the first layer that produces the channels, for messages.
        size: shared by groups that must keep equal numbers of units, such as the layers and directions of one LSTM; they
            are cut in one edit. Empty for a group on its own.
    """

    members: tuple[tuple[str, int], ...]
    units: tuple[tuple[tuple[int, ...], ...], ...]
    name: str = ""
    size: str = ""

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.units)


@dataclass(frozen=True)
class Pinned:
    """Output channels of a layer that cannot be cut, and the first reason met on the way through the model."""

    tensor: str
    dim: int
    reason: str


def coupled_groups(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, attention: str = "heads"
) -> tuple[list[CoupledGroup], list[Pinned]]:
    """Trace a model once and return what can be removed together, and what cannot be removed and why.

    The answer holds for evaluation mode. Fixed sizes written into the model's own code (`reshape(-1, 128)`) are not
    seen: run the forward after a cut. A model that cannot be traced whole is traced child by child.

    Args:
        model: any exportable module; it comes back as it was.
        args: one example of its positional inputs, dimension 0 of every tensor being the batch.
        kwargs: its keyword inputs.
        attention: `"heads"`: a unit of attention is a whole head; `"width"`: it is the same position in every head.

    Returns:
        The groups, in the order of the model's parameters, and the pinned output dimensions.

    Raises:
        ModelError: neither the model nor any part of it can be exported; the message has the reason.
    """
    try:
        program = trace(model, args, kwargs)
    except ModelError as error:
        return _by_parts(model, args, kwargs, attention, error)
    atoms = Atoms(attention)
    walk(program, tensors_of(model), atoms)
    return _read(atoms)


def _by_parts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, attention: str, failure: ModelError
) -> tuple[list[CoupledGroup], list[Pinned]]:
    """Follow each child by itself, with its inputs and outputs as they are; `failure` is raised when none can be."""
    calls: dict[str, tuple[Any, Any]] = {}
    handles = [
        child.register_forward_pre_hook(
            lambda _, given, named, path=path: calls.setdefault(path, (given, named)) and None, with_kwargs=True
        )
        for path, child in model.named_children()
    ]
    try:
        with evaluating(model):
            model(*args, **(kwargs or {}))
    except Exception as error:  # whatever the user's forward raises
        raise failure from error
    finally:
        for handle in handles:
            handle.remove()
    groups: list[CoupledGroup] = []
    pinned: list[Pinned] = []
    held = [id(tensor) for path in calls for tensor in model.get_submodule(path).parameters()]
    for path, (given, named) in calls.items():
        try:
            found, fixed = coupled_groups(model.get_submodule(path), given, named, attention)
        except ModelError:
            continue
        first = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
        for group in found:
            members = tuple((f"{path}.{name}", dim) for name, dim in group.members)
            outside = [n for n, _ in members if n not in first or held.count(id(_tensor(model, n))) > 1]
            if not outside:
                size = f"{path} {group.size}" if group.size else ""
                groups.append(CoupledGroup(members, group.units, f"{path}.{group.name}", size))
        pinned += [replace(pin, tensor=f"{path}.{pin.tensor}") for pin in fixed]
    if not groups:
        raise failure
    return groups, pinned


def _tensor(model: nn.Module, name: str) -> Any:
    """Return a parameter or buffer by its dotted name."""
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _path(tensor: str) -> str:
    """Return the path of the layer that owns a tensor; a tensor of the model itself is its own."""
    return tensor.rpartition(".")[0] or tensor


_ALONE = "its channels depend on one another and could only leave all at once"
_UNEQUAL = "the layers and directions of a recurrent layer share one size, and not all of them can be cut"


def _read(atoms: Atoms) -> tuple[list[CoupledGroup], list[Pinned]]:
    """Turn solved components into groups and pins."""
    root, reason, source = atoms.solve()
    texts = [*atoms.reasons, _ALONE, _UNEQUAL]
    useful = np.zeros(atoms.size, dtype=bool)
    useful[root[source]] = True
    taken = np.flatnonzero(useful[root] & (reason < 0))
    starts = np.array([start for _, _, start, _ in atoms.blocks], dtype=np.int64)
    block = np.searchsorted(starts, taken, side="right") - 1
    units: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for component, of, atom in zip(root[taken].tolist(), block.tolist(), taken.tolist(), strict=True):
        units[component][of].append(atom - atoms.blocks[of][2])
    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for component, unit in units.items():
        alike[tuple(sorted((of, len(indices)) for of, indices in unit.items()))].append(component)
    families = _families(atoms, root, {c: len(found) for found in alike.values() for c in found}, alike)
    groups = []
    for signature, found in alike.items():
        shared = families.get(found[0], "")
        if len(found) > 1 and shared is not None:
            blocks = sorted((of for of, _ in signature), key=lambda of: atoms.blocks[of][:2])
            members = tuple(atoms.blocks[of][:2] for of in blocks)
            producer = min(of for of in blocks if source[atoms.blocks[of][2] + units[found[0]][of][0]])
            indices = tuple(tuple(tuple(units[c][of]) for of in blocks) for c in found)
            groups.append(CoupledGroup(members, indices, _path(atoms.blocks[producer][0]), shared))
        else:
            reason[np.isin(root, found)] = len(texts) - (1 if shared is None else 2)
    pinned = []
    for name, dim, start, size in atoms.blocks:
        fixed = reason[start : start + size][source[start : start + size]]
        fixed = fixed[fixed >= 0]
        if fixed.size:
            share = f"{fixed.size} of {size} channels: " if fixed.size < size else ""
            pinned.append(Pinned(name, dim, share + texts[int(fixed.min())]))
    return groups, pinned


def _families(
    atoms: Atoms, root: np.ndarray, counts: dict[int, int], alike: dict[tuple[tuple[int, int], ...], list[int]]
) -> dict[int, str | None]:
    """Return for each component of a line the size it shares, or None where the line cannot be cut in one piece.

    A line can be cut when all of its units are of one group; every line of a size must be, and give as many units.
    """
    group_of = {component: index for index, found in enumerate(alike.values()) for component in found}
    same: dict[str, str] = {name: name for name, _ in atoms.lines}

    def first(name: str) -> str:
        while same[name] != name:
            name = same[name]
        return name

    owner: dict[int, str] = {}
    for name, labels in atoms.lines:
        for component in set(root[labels].tolist()) - {0}:
            other = first(owner.setdefault(component, name))
            same[max(other, first(name))] = min(other, first(name))
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, labels in atoms.lines:
        components = set(root[labels].tolist())
        whole = len({group_of.get(c, -1) for c in components}) == 1 and next(iter(components)) in group_of
        numbers[first(name)].add(counts[next(iter(components))] if whole else -1)
    good = {name for name, found in numbers.items() if len(found) == 1 and -1 not in found}
    return {component: first(name) if first(name) in good else None for component, name in owner.items()}
