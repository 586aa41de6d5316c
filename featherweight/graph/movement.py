"""Rules for operators that move channels about: views, slices, concatenation, padding."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from featherweight.graph.labels import FIXED, Call, Line, Value, collapse, merge, unknown, varying


def move(call: Call, value: Value | None = None) -> Any:
    """Execute the operator on the labels of its first tensor."""
    value = call.values()[0] if value is None else value
    if len(call.values()) > 1:
        return unknown(call)
    results: list[Line] = [[] for _ in call.shapes]
    for layer in value.layers:
        full = layer.expand(value.shape)
        moved = call.operator(full, *call.args[1:], **call.kwargs)
        for line, labels in zip(results, [moved] if isinstance(moved, Tensor) else moved, strict=True):
            line.append(collapse(labels))
    kept = [tuple(layer for layer in line if varying(layer)) for line in results]
    values = tuple(Value(shape, line, value.static) for shape, line in zip(call.shapes, kept, strict=True))
    return values if call.operator._schema.returns[0].type.kind() == "ListType" else values[0]


def reshape(call: Call) -> Any:
    """Views: a dimension may be split or merged, and the labels follow; of several only one shrinks, best the -1."""
    x, (shape,) = call.values()[0], call.shapes
    sizes = call.get("sizes") or call.get("size") or call.get("shape") or ()
    first = call.get("dim") % len(x.shape) if call.name == "unflatten" else 0
    shrinks = first + list(sizes).index(-1) if -1 in sizes else None
    layers = []
    for layer in x.layers:
        labels = collapse(layer.expand(x.shape).reshape(shape))
        call.atoms.split(labels, call.why(FIXED), shrinks)
        layers.append(labels)
    return call.result(layers, x.static)


def expand(call: Call) -> Any:
    """Broadcasting made explicit."""
    x, (shape,) = call.values()[0], call.shapes
    return call.result((layer.reshape((1,) * (len(shape) - layer.ndim) + layer.shape) for layer in x.layers), x.static)


def identity(call: Call) -> Any:
    """Nothing happens to the channels."""
    x = call.values()[0]
    return x if x.blank else call.result(x.layers, x.static)


def pieces(call: Call) -> Any:
    """Slice, split, chunk: pieces of the channels must keep their proportions, so they lose the same positions."""
    x, steps = call.values()[0], call.get("step", 1)
    (dim,) = call.dims(len(x.shape))
    size = x.shape[dim]
    start, _, _ = slice(call.get("start"), None).indices(size)
    bounds = [start, *accumulate((shape[dim] for shape in call.shapes), initial=start)]
    unit = math.gcd(size, *bounds)
    layers = x.layers if steps == 1 else call.free(x.layers, [dim], "picks channels by number")
    for layer in layers:
        if layer.shape[dim] > 1:
            call.atoms.tie_along(torch.unflatten(layer, dim, (-1, unit)), [dim], call.why(FIXED))
    return move(call, replace(x, layers=tuple(layers)))


def pick(call: Call) -> Any:
    """Select, unbind: along the picked dimension nothing may change, so all of it leaves together or not at all.

    The final states of a recurrent layer are stacked, not split, so each layer and direction keeps labels of its own.
    """
    x = call.values()[0]
    dims = call.dims(len(x.shape)) - ({0} if x.stacked else set())
    return move(call, replace(x, layers=tuple(call.atoms.tie_along(r, dims, call.why(FIXED)) for r in x.layers)))


def shift(call: Call) -> Any:
    """Roll and index_select: free across the channels' dimension only."""
    x, (shape,) = call.values()[0], call.shapes
    dims = call.dims(len(x.shape), "dims" if call.name == "roll" else "dim")
    layers = call.free(x.layers, dims, "renumbers its channels")
    return Value(shape, tuple(layers), x.static)


def index(call: Call) -> Any:
    """Advanced indexing: which index is taken does not matter where labels do not vary."""
    x, indices = call.values()[0], call.get("indices")
    if any(item.layers and not item.static for item in call.values()[1:]):
        return unknown(call)
    taken = {dim for dim, item in enumerate(indices) if item is not None}
    zeros = [None if item is None else torch.zeros(item.shape, dtype=torch.long) for item in indices]
    layers = call.free(x.layers, taken, "picks channels by number")
    moved = [call.operator(layer.expand(x.shape), zeros) for layer in layers]
    if any(tuple(labels.shape) != call.shapes[0] for labels in moved):  # a mask, not indices
        return unknown(call)
    return call.result(map(collapse, moved), x.static)


def concatenate(call: Call) -> Any:
    """Concatenation and stacking: along the joined dimension labels follow as data, elsewhere they are unified."""
    values, rank = call.values(), len(call.shapes[0])
    dim = int(call.get("dim")) % rank
    if call.name == "stack":
        values = [_unsqueeze(value, dim) for value in values]
    across = [replace(v, layers=tuple(r for r in v.layers if r.shape[dim] == 1)) for v in values]
    across = [replace(v, shape=(*v.shape[:dim], 1, *v.shape[dim + 1 :])) for v in across]
    layers = merge(call, across, rank)
    joined = [[layer for layer in value.layers if layer.shape[dim] > 1] for value in values]
    if any(joined):
        dims = {d for line in joined for layer in line for d in varying(layer)}
        parts = []
        for value, line in zip(values, joined, strict=True):
            for extra in line[1:]:
                call.atoms.pin(extra, call.why(FIXED))
            shape = [size if d in dims or d == dim else 1 for d, size in enumerate(value.shape)]
            parts.append((line[0] if line else torch.zeros([1] * rank, dtype=torch.int32)).expand(shape))
        layers.append(collapse(torch.cat(parts, dim)))
        call.atoms.split(layers[-1], call.why(FIXED))
    return call.result(layers, all(value.static for value in values))


def _unsqueeze(value: Value, dim: int) -> Value:
    """Insert a dimension of size 1."""
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    return Value(shape, tuple(layer.unsqueeze(dim) for layer in value.layers), value.static)


def pad(call: Call) -> Any:
    """Padding: padded channels are constants; elsewhere the padding belongs to the channel it pads."""
    x, widths, rank = call.values()[0], call.get("pad"), len(call.shapes[0])
    amounts = {rank - 1 - i // 2: widths[i : i + 2] for i in range(0, len(widths), 2)}
    copied = call.get("mode", "constant") != "constant"
    fixed = [d for d, amount in amounts.items() if any(amount) and (copied or min(amount) < 0)]
    layers = []
    for layer in call.free(x.layers, fixed, "renumbers its channels"):
        own = [w for d in reversed(range(rank)) for w in (amounts.get(d, (0, 0)) if layer.shape[d] > 1 else (0, 0))]
        layers.append(torch.constant_pad_nd(layer, own, 0))
    return call.result(layers, x.static)


def shuffle(call: Call) -> Any:
    """Pixel shuffle and channel shuffle: the groups they form lose the same positions."""
    x, pixels = call.values()[0], call.name == "pixel_shuffle"
    axis = len(x.shape) - 3 if pixels else 1
    layers = []
    for layer in x.layers:
        if layer.shape[axis] > 1:
            grid = torch.unflatten(
                layer, axis, (-1, call.get("upscale_factor") ** 2) if pixels else (call.get("groups"), -1)
            )
            tied = call.atoms.tie_along(grid, [axis + 1 if pixels else axis], call.why(FIXED))
            layer = tied.expand_as(grid).flatten(axis, axis + 1)
        layers.append(layer)
    return move(call, replace(x, layers=tuple(layers)))
