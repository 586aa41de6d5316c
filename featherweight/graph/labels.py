"""How channel labels pass through one operator.

Every index of every dimension of every parameter and buffer is an *atom*. A tensor inside the model carries *layers* of
labels: a layer says for each element which atom it leaves with, 0 for none ("constant"). Activations mostly have one
layer, a parameter has one for each of its dimensions. A layer is stored with size 1 along the dimensions it does not
vary along, so that pointwise work costs a handful of numbers. Data movement needs no rule of its own: the operator is
executed on the labels. What has no rule here is pinned, so a mistake costs freedom, never correctness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from featherweight.graph import Atoms

Line = list[Tensor]


@dataclass(frozen=True)
class Value:
    """A tensor inside the traced model: its shape, its label layers, and whether it depends on parameters alone."""

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()  # int32, as many dimensions as `shape`, size 1 where the labels do not vary
    static: bool = False


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
        """Pin the layers that vary along `dims` and return the others."""
        kept = []
        for layer in layers:
            if varying(layer) & frozenset(dims):
                self.atoms.pin(layer, self.why(text))
            else:
                kept.append(layer)
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
    free where that operand has size 1 (it is broadcast), and pinned where it has full size.
    """
    shapes = [(1,) * (rank - len(value.shape)) + value.shape for value in values]
    lines = [[layer.reshape((1,) * (rank - layer.ndim) + layer.shape) for layer in value.layers] for value in values]
    merged: Line = []
    for i, line in enumerate(lines):
        for layer in line:
            dims = varying(layer)
            for j, other in enumerate(lines):
                if i != j and not any(dims & varying(o) for o in other) and any(shapes[j][d] > 1 for d in dims):
                    call.atoms.pin(layer, call.why(FIXED))
            for known in [known for known in merged if dims & varying(known)]:
                call.atoms.tie(known, layer, call.why(FIXED))
                merged = [m for m in merged if m is not known]
                layer = torch.maximum(known, layer)  # tied where both are labels, so either will do
            merged.append(layer)
    return merged


def pointwise(call: Call, values: Sequence[Value] | None = None) -> Any:
    """Element by element: the operands' channels leave together."""
    values = call.values() if values is None else values
    return call.result(merge(call, values, len(call.shapes[0])), all(value.static for value in values))


def per_channel(call: Call) -> Any:
    """Batch norm, PReLU, instance norm and the like: pointwise, with parameters along dimension 1."""
    x = call.get("input", call.get("self"))
    names = ("weight", "bias", "running_mean", "running_var")
    rank = len(x.shape)
    if call.name in ("instance_norm", "group_norm"):
        if call.name == "group_norm" and call.get("num_groups") != x.shape[1]:
            return unknown(call, "normalises over groups of channels")
        x = replace(x, layers=tuple(call.free(x.layers, {0, *range(2, rank)}, "normalises over its channels")))
    given = [value for value in map(call.get, names) if isinstance(value, Value)]
    ones = (1,) * max(rank - 2, 0)
    aligned = [Value(v.shape + ones, tuple(r.reshape(r.shape + ones) for r in v.layers), True) for v in given]
    return pointwise(call, [x, *aligned])


def layer_norm(call: Call) -> Any:
    """Layer norm and RMS norm: channels that are normalised over are pinned, others pass."""
    x = call.get("input")
    normalised = range(len(x.shape) - len(call.get("normalized_shape")), len(x.shape))
    text = "normalises over its channels"
    for value in call.values()[1:]:
        call.free(value.layers, range(len(value.shape)), text)
    call.free(x.layers, normalised, text)
    return call.result(x.layers)  # pinned labels go on, so that what is added later names this reason


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


def produce(call: Call, out: Tensor, axis: int, bias: Value | None, others: Sequence[Tensor] = ()) -> Line:
    """Return the layers of a result whose channels carry the labels `out`, `[channels]`, along `axis`."""
    if bias is not None:
        call.atoms.tie(channels(call, bias, len(bias.shape) - 1)[0], out, call.why(FIXED))
    if not all(value.static for value in call.values()[:2]):  # a product of parameters is a weight, no layer
        call.atoms.source(out)
    return [*others, out.reshape([-1 if d == axis else 1 for d in range(len(call.shapes[0]))])]


def convolution(call: Call) -> Any:
    """Convolution: labels end at the weight's inputs and start anew at its outputs; depthwise ones pass on."""
    x, weight, groups = call.get("input"), call.get("weight"), call.get("groups")
    if not weight.static:
        return unknown(call, "convolves with a computed weight")
    axis = len(x.shape) - len(weight.shape) + 1
    line, others = channels(call, x, axis)
    call.free(others, range(len(x.shape)), "slides over its channels")
    first, second = channels(call, weight, 0)[0], channels(call, weight, 1)[0]
    depthwise = groups > 1 and line.numel() == groups
    why, out = call.why(FIXED), first
    if "transpose" in call.name or call.get("transposed"):
        call.atoms.tie(line, first, why)
        if not depthwise:
            call.atoms.tie_along(first.reshape(groups, -1), [0], why)
        out = first.repeat_interleave(second.numel()) if depthwise else second.repeat(groups)
    elif depthwise:
        call.atoms.tie(first.reshape(groups, -1), line.reshape(groups, 1), why)
    else:
        call.atoms.tie(line.reshape(groups, -1), second, why)
        call.atoms.tie_along(first.reshape(groups, -1), [0], why)
    return call.result(produce(call, out, axis, call.get("bias")))


def product(call: Call) -> Any:
    """Linear layers and matrix products with a parameter on the right; labels along other dimensions pass."""
    linear = call.name == "linear"
    x, weight = (call.get("input"), call.get("weight")) if linear else call.values()[-2:]
    bias = call.get("bias") if linear else call.get("self") if call.name == "addmm" else None
    if not weight.static or len(weight.shape) != 2 or (bias is not None and not bias.static):
        return unknown(call, "multiplies activations with each other")
    line, others = channels(call, x, len(x.shape) - 1)
    call.atoms.tie(line, channels(call, weight, 1 if linear else 0)[0], call.why(FIXED))
    out = channels(call, weight, 0 if linear else 1)[0]
    return call.result(produce(call, out, len(x.shape) - 1, bias, others), x.static)


def embedding(call: Call) -> Any:
    """Embedding: new labels along the last dimension."""
    weight, indices = call.get("weight"), call.get("indices")
    out, others = channels(call, weight, 1)[0], [layer.unsqueeze(-1) for layer in indices.layers]
    return call.result(produce(call, out, len(call.shapes[0]) - 1, None, others))


def local(call: Call) -> Any:
    """Pooling and resampling: each channel by itself, over the last one, two or three dimensions."""
    x = call.values()[0]
    match = re.search(r"(\d)d", call.name)
    spatial = set(range(len(x.shape) - int(match[1] if match else 0), len(x.shape)))
    inside = [layer for layer in x.layers if not varying(layer) <= spatial]
    call.free([layer for layer in x.layers if varying(layer) <= spatial], spatial, "slides over its channels")
    return call.result(call.atoms.tie_along(layer, spatial, call.why(FIXED)) for layer in inside)


def reduction(call: Call) -> Any:
    """Sum, mean, maximum and the like over some dimensions."""
    x = call.values()[0]
    dims = call.dims(len(x.shape))
    kept = call.free(x.layers, dims, "over its channels")
    if not call.get("keepdim", False):
        kept = [layer.reshape([s for d, s in enumerate(layer.shape) if d not in dims]) for layer in kept]
    return call.result(kept)


def along(call: Call) -> Any:
    """Softmax, cumulative sums and sorting along one dimension."""
    x = call.values()[0]
    return call.result(call.free(x.layers, call.dims(len(x.shape)), "over its channels"))


def gate(call: Call) -> Any:
    """GLU: the two halves leave together."""
    x = call.values()[0]
    (dim,) = call.dims(len(x.shape))
    layers = []
    for layer in x.layers:
        halves = torch.unflatten(layer, dim, (2, -1)) if layer.shape[dim] > 1 else layer.unsqueeze(dim)
        layers.append(call.atoms.tie_along(halves, [dim], call.why(FIXED)).squeeze(dim))
    return call.result(layers)


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
    """Views: a dimension may be split or merged, and the labels follow; only one written as -1 can shrink."""
    x, (shape,) = call.values()[0], call.shapes
    sizes = call.get("sizes") or call.get("size") or call.get("shape") or ()
    first = call.get("dim") % len(x.shape) if call.name == "unflatten" else 0
    shrinks = first + list(sizes).index(-1) if -1 in sizes else None
    layers = []
    for layer in x.layers:
        labels = collapse(layer.expand(x.shape).reshape(shape))
        if shrinks in varying(labels):
            labels = call.atoms.tie_along(labels, varying(labels) - {shrinks}, call.why(FIXED))
        call.atoms.split(labels, call.why(FIXED))
        layers.append(labels)
    return call.result(layers, x.static)


def expand(call: Call) -> Any:
    """Broadcasting made explicit."""
    x, (shape,) = call.values()[0], call.shapes
    return call.result((layer.reshape((1,) * (len(shape) - layer.ndim) + layer.shape) for layer in x.layers), x.static)


def identity(call: Call) -> Any:
    """Nothing happens to the channels."""
    x = call.values()[0]
    return call.result(x.layers, x.static)


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
    """Select, unbind: along the picked dimension nothing may change, so all of it leaves together or not at all."""
    x = call.values()[0]
    dims = call.dims(len(x.shape))
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


RULES: dict[str, Callable[[Call], Any]] = {}
for _rule, _names in (
    (pointwise, "add sub mul div pow where clamp fmod remainder rsub multiply divide subtract negative true_divide"),
    (pointwise, "hardswish log_sigmoid softplus masked_fill copy fill zero floor_divide logical_not isfinite"),
    (per_channel, "batch_norm prelu instance_norm group_norm"),
    (layer_norm, "layer_norm rms_norm"),
    (convolution, "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"),
    (product, "linear addmm mm matmul"),
    (embedding, "embedding"),
    (reduction, "mean sum amax amin max min prod var std norm linalg_vector_norm logsumexp argmax argmin any all"),
    (reduction, "var_mean std_mean nanmean median"),
    (along, "softmax log_softmax _softmax _log_softmax cumsum cumprod sort argsort topk"),
    (gate, "glu"),
    (move, "permute transpose t numpy_T mT movedim moveaxis swapaxes swapdims flip repeat tile repeat_interleave"),
    (move, "pixel_unshuffle"),
    (reshape, "view reshape _unsafe_view flatten unflatten view_as reshape_as squeeze unsqueeze"),
    (expand, "expand expand_as broadcast_to"),
    (identity, "clone contiguous detach to _to_copy type_as alias lift_fresh_copy float half bfloat16"),
    (identity, "dropout feature_dropout alpha_dropout feature_alpha_dropout"),
    (identity, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    (pieces, "slice narrow split split_with_sizes chunk"),
    (pick, "select unbind"),
    (shift, "roll index_select"),
    (index, "index"),
    (concatenate, "cat concat concatenate stack"),
    (pad, "pad constant_pad_nd"),
    (shuffle, "pixel_shuffle channel_shuffle"),
):
    RULES.update(dict.fromkeys(_names.split(), _rule))
LOCAL = re.compile(r"(adaptive_)?(avg|max)_pool\dd(_with_indices)?|_?upsample_(\w+?)\dd")
TEXTS = {
    "bmm": "multiplies activations with each other",
    "baddbmm": "multiplies activations with each other",
    "einsum": "multiplies activations with each other",
    "scaled_dot_product_attention": "multiplies activations with each other",
    "lstm": "is recurrent",
    "gru": "is recurrent",
    "rnn_tanh": "is recurrent",
    "rnn_relu": "is recurrent",
}


def apply(call: Call) -> Any:
    """Return the labelled result, a `Value` or a tuple of them, of one operator."""
    tags = getattr(call.operator, "tags", ())
    if not call.values() or call.name.startswith("new_"):
        values = tuple(Value(shape, static=True) for shape in call.shapes)
        return values if len(values) > 1 else values[0]
    if torch.Tag.pointwise in tags:
        return pointwise(call)
    if getattr(call.operator, "namespace", "") == "aten":
        rule = local if LOCAL.fullmatch(call.name) else RULES.get(call.name)
        if rule:
            return rule(call)
    return unknown(call, TEXTS.get(call.name, "has no rule for channels"))
