"""Which slices of which parameters must be removed together, read from one trace of the model.

The model is exported once; labels are pushed through the exported graph by `featherweight.graph.labels`, which says which
indices of which parameters and buffers leave together. Components of that relation are the units of a coupled group.
The idea of a coupled group: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from featherweight.graph.labels import Call, Value, apply, collapse, unknown, varying
from featherweight.trace import trace, where


@dataclass(frozen=True)
class CoupledGroup:
    """Channels that may be removed one unit at a time.

    Attributes:
        members: `(tensor name, dimension)` of every slice a unit takes with it, sorted.
        units: `units[u][m]` are the indices of `members[m]` that unit `u` owns; a linear layer behind a flatten has
            height * width of them for each channel.
        name: path of the first layer that produces the channels, for messages.
    """

    members: tuple[tuple[str, int], ...]
    units: tuple[tuple[tuple[int, ...], ...], ...]
    name: str = ""

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
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[list[CoupledGroup], list[Pinned]]:
    """Trace a model once and return what can be removed together, and what cannot be removed and why.

    The answer holds for evaluation mode. Fixed sizes written into the model's own code (`reshape(-1, 128)`) are not
    seen: run the forward after a cut.

    Args:
        model: any exportable module; it comes back as it was.
        args: one example of its positional inputs, dimension 0 of every tensor being the batch.
        kwargs: its keyword inputs.

    Returns:
        The groups, in the order of the model's parameters, and the pinned output dimensions.

    Raises:
        ModelError: the model cannot be exported; the message has the reason.
    """
    program = trace(model, args, kwargs)
    atoms = Atoms()
    _walk(program, _tensors(model), atoms)
    return _read(atoms)


class Atoms:
    """All atoms of a model, which of them leave together, and which never can."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int, int]] = []  # tensor, dim, first atom, size
        self.size = 1  # atom 0 is the constant
        self.reasons: list[str] = []
        self._pins: list[tuple[np.ndarray, int]] = []
        self._edges: list[np.ndarray] = []
        self._sources: list[np.ndarray] = []
        self._split: list[tuple[Tensor, str]] = []

    def tensor(self, name: str, shape: Sequence[int]) -> Value:
        """Give every index of every dimension of a parameter an atom; a dimension of size 1 cannot be cut."""
        layers = []
        for dim, size in enumerate(shape):
            if size > 1:
                labels = torch.arange(self.size, self.size + size, dtype=torch.int32)
                layers.append(labels.reshape([-1 if d == dim else 1 for d in range(len(shape))]))
                self.blocks.append((name, dim, self.size, size))
                self.size += size
        return Value(tuple(shape), tuple(layers), static=True)

    def pin(self, labels: Tensor, why: str) -> None:
        """Forbid the removal of these atoms; the first reason given is the one reported."""
        ids = np.unique(labels.numpy())
        if ids[ids > 0].size:
            if not self.reasons or self.reasons[-1] != why:
                self.reasons.append(why)
            self._pins.append((ids[ids > 0], len(self.reasons) - 1))

    def tie(self, left: Tensor, right: Tensor, why: str) -> None:
        """Let two label arrays leave together element by element; a label that meets a constant is pinned."""
        shape = np.broadcast_shapes(left.shape, right.shape)
        left, right = left.expand(shape), right.expand(shape)
        apart = left != right
        if apart.any():
            pairs = torch.stack((left[apart], right[apart]))
            meets_constant = (pairs == 0).any(0)
            self.pin(pairs[:, meets_constant], why)
            if not meets_constant.all():
                self._edges.append(pairs[:, ~meets_constant].numpy())

    def tie_along(self, labels: Tensor, dims: Iterable[int], why: str) -> Tensor:
        """Let all elements along these dimensions leave together; the layer comes back with size 1 there."""
        for dim in dims:
            if labels.shape[dim] > 1:
                self.tie(labels, labels.narrow(dim, 0, 1), why)
                labels = labels.amax(dim, keepdim=True)
        return labels

    def source(self, labels: Tensor) -> None:
        """Mark atoms as output channels of a layer: only groups that hold one can be cut."""
        self._sources.append(labels.numpy().ravel())

    def split(self, labels: Tensor, why: str) -> None:
        """Remember a tensor whose labels vary along several dimensions; `solve` keeps it rectangular."""
        if len(varying(labels)) > 1:
            self._split.append((labels, why))

    def solve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for every atom its component, the component's first reason (-1: free), and whether it is a source.

        What is left of a tensor after a removal must be rectangular. Where components vary along several dimensions of
        one tensor (a view that splits the channels, as in a channel shuffle), the last of them is the one that shrinks.
        """
        root = _components(self.size, self._edges)
        changed = True
        while changed:
            before = len(self._edges)
            for labels, why in self._split:
                now = collapse(torch.from_numpy(root)[labels.long()])
                self.tie_along(now, sorted(varying(now))[:-1], why)
            changed = len(self._edges) > before
            root = _components(self.size, self._edges) if changed else root
        reason = np.full(self.size, len(self.reasons), dtype=np.int64)
        for ids, index in self._pins:
            np.minimum.at(reason, root[ids], index)
        reason = reason[root]
        reason[reason == len(self.reasons)] = -1
        source = np.zeros(self.size, dtype=bool)
        source[np.concatenate([np.zeros(1, dtype=np.int32), *self._sources])] = True
        source[0] = False
        return root, reason, source


def _components(size: int, edges: Sequence[np.ndarray]) -> np.ndarray:
    """Return the smallest atom connected with each atom, by hooking roots together and halving the paths."""
    root = np.arange(size, dtype=np.int32)
    left, right = np.concatenate([np.zeros((2, 0), dtype=np.int32), *edges], axis=1)
    while left.size:
        np.minimum.at(root, np.maximum(root[left], root[right]), np.minimum(root[left], root[right]))
        while not np.array_equal(root, root[root]):
            root = root[root]
        apart = root[left] != root[right]
        left, right = left[apart], right[apart]
    return root


def _tensors(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for every name of a parameter or buffer its first name (ties have several) and its shape."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[name] = (first.setdefault(id(tensor), name), tuple(tensor.shape))
    return names


def _walk(program: ExportedProgram, tensors: dict[str, tuple[str, tuple[int, ...]]], atoms: Atoms) -> None:
    """Push labels through every node of the exported graph."""
    made: dict[str, Value] = {}
    inputs: dict[str, Value] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in tensors:
            name, shape = tensors[spec.target]
            made[name] = made[name] if name in made else atoms.tensor(name, shape)
            inputs[spec.arg.name] = made[name]
    constants = {s.arg.name for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    known: dict[Node, Any] = {}
    for node in program.graph.nodes:
        shapes, dynamic = _shapes(node)
        if node.op == "placeholder":
            default = Value(shapes[0], static=node.name in constants) if shapes else None
            known[node] = inputs.get(node.name, default)
        elif node.op == "output":
            _outputs(program, node, known, atoms)
        elif node.target is operator.getitem:
            whole = known[node.args[0]]
            known[node] = whole[node.args[1]] if isinstance(whole, tuple) else whole
        elif node.op == "call_function" and "_assert" not in str(node.target):
            args, kwargs = pytree.tree_map_only(Node, lambda n: known.get(n), (node.args, node.kwargs))
            name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))
            name = name if name.startswith("_") else name.rstrip("_")
            call = Call(node.target, name, tuple(args), dict(kwargs), shapes or ((),), atoms, where(node))
            known[node] = unknown(call, "has a size that depends on the data") if dynamic else apply(call)


def _shapes(node: Node) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Return the shapes of a node's tensor results, and whether any size is only known at run time."""
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    dynamic = any(not isinstance(size, int) for leaf in leaves for size in leaf.shape)
    return tuple(tuple(s if isinstance(s, int) else 1 for s in leaf.shape) for leaf in leaves), dynamic


def _outputs(program: ExportedProgram, node: Node, known: dict[Node, Any], atoms: Atoms) -> None:
    """Pin what the model returns: its shape is a promise to the caller."""
    leaves = pytree.tree_leaves(node.args[0])
    for spec, leaf in zip(program.graph_signature.output_specs, leaves, strict=True):
        value = known.get(leaf) if isinstance(leaf, Node) else None
        kind = "an output of the model" if spec.kind is OutputKind.USER_OUTPUT else "written back into the model"
        for layer in value.layers if isinstance(value, Value) else ():
            atoms.pin(layer, f"it is {kind}")


def _path(tensor: str) -> str:
    """Return the path of the layer that owns a tensor; a tensor of the model itself is its own."""
    return tensor.rpartition(".")[0] or tensor


def _read(atoms: Atoms) -> tuple[list[CoupledGroup], list[Pinned]]:
    """Turn solved components into groups and pins."""
    root, reason, source = atoms.solve()
    useful = np.zeros(atoms.size, dtype=bool)
    useful[root[source]] = True
    taken = np.flatnonzero(useful[root] & (reason < 0))
    starts = np.array([start for _, _, start, _ in atoms.blocks], dtype=np.int64)
    block = np.searchsorted(starts, taken, side="right") - 1
    units: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for component, of, atom in zip(root[taken].tolist(), block.tolist(), taken.tolist(), strict=True):
        units[component][of].append(atom - atoms.blocks[of][2])
    alike: dict[tuple[tuple[int, int], ...], list[dict[int, list[int]]]] = defaultdict(list)
    for unit in units.values():
        alike[tuple(sorted((of, len(indices)) for of, indices in unit.items()))].append(unit)
    groups = []
    for signature, found in alike.items():
        if len(found) > 1:
            blocks = sorted((of for of, _ in signature), key=lambda of: atoms.blocks[of][:2])
            members = tuple(atoms.blocks[of][:2] for of in blocks)
            producer = min(of for of in blocks if source[atoms.blocks[of][2] + found[0][of][0]])
            indices = tuple(tuple(tuple(unit[of]) for of in blocks) for unit in found)
            groups.append(CoupledGroup(members, indices, _path(atoms.blocks[producer][0])))
        else:
            for of in found[0]:
                start = atoms.blocks[of][2]
                reason[[start + index for index in found[0][of]]] = len(atoms.reasons)
    texts = [*atoms.reasons, "its channels depend on one another and could only leave all at once"]
    pinned = []
    for name, dim, start, size in atoms.blocks:
        fixed = reason[start : start + size][source[start : start + size]]
        fixed = fixed[fixed >= 0]
        if fixed.size:
            share = f"{fixed.size} of {size} channels: " if fixed.size < size else ""
            pinned.append(Pinned(name, dim, share + texts[int(fixed.min())]))
    return groups, pinned
