"""How channel labels pass through one operator.

Every index of every dimension of every parameter and buffer is an *atom*. A tensor inside the model carries *layers* of
labels: a layer says for each element which atom it leaves with, 0 for none ("constant"). Activations mostly have one
layer, a parameter has one for each of its dimensions. A layer is stored with size 1 along the dimensions it does not
vary along, so that pointwise work costs a handful of numbers. Data movement needs no rule of its own: the operator is
executed on the labels. What has no rule here is pinned, so a mistake costs freedom, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from featherweight.graph.atoms import Atoms

Line = list[Tensor]


@dataclass(frozen=True)
class Value:
    """A tensor inside the traced model: its shape, its label layers, whether it depends on parameters alone."""

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()  # int32, as many dimensions as `shape`, size 1 where the labels do not vary
    static: bool = False
    stacked: bool = False  # along dimension 0 lie lines of labels that shrink apart, each by as many
    blank: bool = False  # zeros that a model starts a state with; they are made anew, as wide as what they meet


def collapse(labels: Tensor) -> Tensor:
    """Shrink to size 1 every dimension along which the labels do not vary."""
    for dim, size in enumerate(labels.shape):
        first = labels.narrow(dim, 0, min(size, 1))
        if size > 1 and (labels.stride(dim) == 0 or torch.equal(labels, first.expand_as(labels))):
            labels = first
    return labels


def varying(labels: Tensor) -> frozenset[int]:
    """Return the dimensions along which a stored layer varies."""
    return frozenset(dim for dim, size in enumerate(labels.shape) if size > 1)


@dataclass(frozen=True)
class Call:
    """One operator of the traced model, with its tensors replaced by `Value`s."""

    operator: Any
    name: str  # without namespace, overload and the underscore of in-place variants
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]  # of the results
    atoms: Atoms = field(repr=False)
    where: str  # "at model.py:41 (attention)"
    feeds: frozenset[str] = frozenset()  # names of the operators that read the result, two steps on

    def why(self, text: str) -> str:
        """Return the reason for a pin: operator, what it does, line and layer."""
        namespace = getattr(self.operator, "namespace", "")
        return f"{namespace}{'.' * bool(namespace)}{self.name} {text} {self.where}".strip()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument by the name it has in the operator's schema."""
        for position, argument in enumerate(self.operator._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value)
        return default

    def dims(self, rank: int, name: str = "dim") -> frozenset[int]:
        """Return a dimension argument as non-negative dimensions; all of them when it is empty."""
        dims = self.get(name)
        dims = [dims] if isinstance(dims, int) else dims
        return frozenset(d % rank for d in dims) if dims and rank else frozenset(range(rank))

    def values(self) -> list[Value]:
        """Return every tensor argument, those inside lists too."""
        flat: list[Any] = []
        for item in (*self.args, *self.kwargs.values()):
            flat.extend(item if isinstance(item, (list, tuple)) else [item])
        return [item for item in flat if isinstance(item, Value)]

    def result(self, layers: Iterable[Tensor], static: bool = False) -> Any:
        """Return the operator's result, all outputs with the same layers; layers that no longer vary are dropped."""
        kept = tuple(layer for layer in layers if varying(layer))
        values = tuple(Value(shape, tuple(r for r in kept if r.ndim == len(shape)), static) for shape in self.shapes)
        return values if len(values) > 1 else values[0]

    def free(self, layers: Iterable[Tensor], dims: Iterable[int], text: str) -> Line:
        """Return the layers that can still shrink when nothing leaves along `dims`; the others are pinned."""
        kept = []
        for layer in layers:
            touched = varying(layer) & frozenset(dims)
            if touched and touched == varying(layer):
                self.atoms.pin(layer, self.why(text))
            else:
                kept.append(self.atoms.tie_along(layer, touched, self.why(text)))
        return kept


FIXED = "meets a tensor of fixed size"


def unknown(call: Call, text: str = "has no rule for channels") -> Any:
    """Pin everything the operator reads."""
    for value in call.values():
        for layer in value.layers:
            call.atoms.pin(layer, call.why(text))
        if value.static and len(value.shape) > 1 and value.layers:
            call.atoms.source(value.layers[0])
    return call.result([])


def merge(call: Call, values: Sequence[Value], rank: int) -> Line:
    """Unify the layers of operands that are broadcast against each other.

    Layers that share a dimension leave together element by element. A layer without a counterpart in another operand is
    free where that operand has size 1 (it is broadcast) or is blank, and fixed where it has full size: a layer that varies
    along other dimensions too, as a view into heads does, can still shrink along those.
    """
    shapes = [
        (1,) * rank if value.blank and call.name != "copy" else (1,) * (rank - len(value.shape)) + value.shape
        for value in values
    ]
    lines = [[layer.reshape((1,) * (rank - layer.ndim) + layer.shape) for layer in value.layers] for value in values]
    merged: Line = []
    for i, line in enumerate(lines):
        for layer in line:
            dims = varying(layer)
            if call.atoms.attention == "heads" and values[i].static and _within_heads(dims, lines, values):
                continue  # one gain for each position of every head: it stays when whole heads leave
            fixed: set[int] = set()
            for j, other in enumerate(lines):
                met = frozenset().union(*(varying(o) for o in other))
                wide = (
                    call.atoms.attention == "heads"
                    and values[j].static
                    and bool(met)
                    and met <= dims - {min(dims, default=0)}
                )
                fixed |= {d for d in dims if i != j and shapes[j][d] > 1 and (wide or not dims & met)}
            if fixed == dims:
                call.atoms.pin(layer, call.why(FIXED))
            else:
                layer = call.atoms.tie_along(layer, fixed, call.why(FIXED))
            for known in [known for known in merged if varying(layer) & varying(known)]:
                call.atoms.tie(known, layer, call.why(FIXED))
                merged = [m for m in merged if m is not known]
                layer = torch.maximum(known, layer)  # tied where both are labels, so either will do
            merged.append(layer)
    return merged


def _within_heads(dims: frozenset[int], lines: Sequence[Line], values: Sequence[Value]) -> bool:
    """Whether an activation varies along heads, and these dimensions lie within a head, behind them."""
    activations = [layer for line, value in zip(lines, values, strict=True) if not value.static for layer in line]
    return any(dims <= varying(layer) - {min(varying(layer), default=0)} for layer in activations)


def pointwise(call: Call, values: Sequence[Value] | None = None) -> Any:
    """Element by element: the operands' channels leave together."""
    values = call.values() if values is None else values
    return call.result(merge(call, values, len(call.shapes[0])), all(value.static for value in values))


def channels(call: Call, value: Value, axis: int) -> tuple[Tensor, Line]:
    """Return the labels along one dimension, `[size]`, and the layers that do not vary along it."""
    line, others = torch.zeros(value.shape[axis], dtype=torch.int32), []
    for layer in value.layers:
        if layer.shape[axis] == 1:
            others.append(layer)
            continue
        own = call.atoms.tie_along(layer, set(range(layer.ndim)) - {axis}, call.why(FIXED)).flatten()
        if line.any():
            call.atoms.tie(line, own, call.why(FIXED))
        line = own
    return line, others
