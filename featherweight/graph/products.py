"""Rules for layers that mix channels: labels end at their inputs and start anew at their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.graph.labels import FIXED, Call, Line, Value, channels, merge, unknown, varying


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
        return matrix_product(call, x, weight, bias)
    line, others = channels(call, x, len(x.shape) - 1)
    if not x.blank:
        call.atoms.tie(line, channels(call, weight, 1 if linear else 0)[0], call.why(FIXED))
    out = channels(call, weight, 0 if linear else 1)[0]
    return call.result(produce(call, out, len(x.shape) - 1, bias, others), x.static)


def matrix_product(call: Call, x: Value, y: Value, bias: Value | None = None) -> Any:
    """A product of two activations, as in attention: `[..., n, k]` by `[..., k, m]`, or of one with stacked parameters."""
    if min(len(x.shape), len(y.shape)) < 2 or bias is not None or call.name == "linear":
        return unknown(call, "multiplies activations with each other")
    batch = [chr(ord("A") + i) for i in range(max(len(x.shape), len(y.shape)) - 2)]
    left, right = ["".join(batch[len(batch) - len(v.shape) + 2 :]) for v in (x, y)]
    return _contracted(call, [(x, f"{left}nk"), (y, f"{right}km")], "".join(batch) + "nm")


def batched_product(call: Call) -> Any:
    """Batched matrix products; what is added to one is broadcast over it."""
    if call.name == "baddbmm":
        x, y = call.values()[1:3]
        return Value(call.shapes[0], tuple(merge(call, [call.values()[0], matrix_product(call, x, y)], 3)))
    return matrix_product(call, *call.values()[:2])


def einsum(call: Call) -> Any:
    """Einstein summation: one letter, one set of channels."""
    equation, values = call.get("equation").replace(" ", ""), call.values()
    inputs, arrow, out = equation.partition("->")
    names = inputs.split(",")
    if not arrow or "." in equation or any(len(set(name)) < len(name) for name in names):
        return unknown(call, "multiplies activations with each other")
    return _contracted(call, list(zip(values, names, strict=True)), out)


def _contracted(call: Call, operands: Sequence[tuple[Value, str]], out: str) -> Value:
    """Tie the channels that share a letter; those of letters in the result pass to it.

    A view into heads varies along the head and the position in it. Whole heads leave when the letter of the heads is kept,
    the same positions of every head when another is: `atoms.attention` says which.
    """
    why = call.why(FIXED)
    sizes = {
        letter: size for value, name in operands for letter, size in zip(name, value.shape, strict=True) if size > 1
    }
    shared = {letter for letter in sizes if all(letter in name for _, name in operands) and letter in out}
    lines: dict[str, Tensor] = {}
    made: set[str] = set()
    for value, name in operands:
        found: dict[str, Tensor] = {}
        for layer in value.layers:
            heads = [d for d in varying(layer) if name[d] in shared]
            inside = [d for d in varying(layer) if name[d] not in shared]
            dims = inside + heads if call.atoms.attention == "heads" else heads + inside
            own = call.atoms.tie_along(layer, dims[:-1], why).flatten()
            letter = name[dims[-1]]
            if letter in found:
                call.atoms.tie(found[letter], own, why)
            found[letter] = own
        for letter, size in zip(name, value.shape, strict=True):
            line = found.get(letter, torch.zeros(size, dtype=torch.int32))
            if (
                value.static
                and letter in found
                and letter in out
                and not any(letter in other for v, other in operands if v is not value)
            ):
                made.add(letter)
            if size > 1 and letter in lines:
                call.atoms.tie(lines[letter], line, why)
                line = torch.maximum(lines[letter], line)
            if size > 1:
                lines[letter] = line
    static = all(value.static for value, _ in operands)
    for letter in made if not static else ():
        call.atoms.source(lines[letter])
    layers = [
        lines[letter].reshape([-1 if d == place else 1 for d in range(len(out))])
        for place, letter in enumerate(out)
        if letter in lines and lines[letter].any()
    ]
    return Value(tuple(sizes.get(letter, 1) for letter in out), tuple(layers), static)


def attention(call: Call) -> Any:
    """Scaled dot-product attention: heads leave together; the width of a head only where the scale does not follow from it."""
    query, key, value, mask = (call.get(name) for name in ("query", "key", "value", "attn_mask"))
    rank = len(query.shape)
    if call.get("scale") is None and call.atoms.attention == "width":
        for item in (query, key):
            for layer in item.layers:
                if rank - 1 in varying(layer):
                    call.atoms.pin(layer, call.why("scales by the width of a head"))
    if call.get("enable_gqa"):
        key, value = (_repeated(item, query.shape[-3] // item.shape[-3]) for item in (key, value))
    batch = "".join(chr(ord("A") + i) for i in range(rank - 2))
    scores = _contracted(call, [(query, f"{batch}le"), (key, f"{batch}se")], f"{batch}ls")
    if isinstance(mask, Value):
        scores = Value(scores.shape, tuple(merge(call, [scores, mask], rank)))
    mixed = _contracted(call, [(scores, f"{batch}ls"), (value, f"{batch}sv")], f"{batch}lv")
    return call.result(mixed.layers)


def _repeated(value: Value, times: int) -> Value:
    """Repeat every head of a tensor, as grouped-query attention does."""
    dim = len(value.shape) - 3
    layers = (r.repeat_interleave(times, dim) if r.shape[dim] > 1 else r for r in value.layers)
    return Value((*value.shape[:dim], value.shape[dim] * times, *value.shape[dim + 1 :]), tuple(layers), value.static)


def embedding(call: Call) -> Any:
    """Embedding: new labels along the last dimension."""
    weight, indices = call.get("weight"), call.get("indices")
    out, others = channels(call, weight, 1)[0], [layer.unsqueeze(-1) for layer in indices.layers]
    return call.result(produce(call, out, len(call.shapes[0]) - 1, None, others))
