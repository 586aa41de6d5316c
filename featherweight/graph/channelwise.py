"""Rules for what works on each channel or over all of them: norms, pooling, reductions, gates."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from featherweight.graph.labels import FIXED, Call, Value, pointwise, unknown, varying

NORMALISES = "normalises over its channels"


def per_channel(call: Call) -> Any:
    """Batch norm, PReLU, instance norm and the like: pointwise, with parameters along dimension 1."""
    x = call.get("input", call.get("self"))
    rank = len(x.shape)
    if call.name in ("instance_norm", "group_norm"):
        x = replace(x, layers=tuple(call.free(x.layers, {0, *range(2, rank)}, NORMALISES)))
    return pointwise(call, [x, *_aligned(call, rank)])


def _aligned(call: Call, rank: int) -> list[Value]:
    """Return the parameters of a norm with dimensions of size 1 behind, so that they lie along dimension 1."""
    names = ("weight", "bias", "running_mean", "running_var")
    given = [value for value in map(call.get, names) if isinstance(value, Value)]
    ones = (1,) * max(rank - 2, 0)
    return [Value(v.shape + ones, tuple(r.reshape(r.shape + ones) for r in v.layers), True) for v in given]


def group_norm(call: Call) -> Any:
    """Group norm: every group loses the same positions, and takes its statistics over those that are left."""
    x, groups = call.get("input"), call.get("num_groups")
    if groups == x.shape[1]:
        return per_channel(call)
    if call.get("weight") is None:
        return unknown(call, f"{NORMALISES}, without weights that say which are kept")
    inside = call.free(x.layers, {0, *range(2, len(x.shape))}, NORMALISES)
    for layer in inside:
        call.atoms.tie_along(torch.unflatten(layer, 1, (groups, -1)), [1], call.why(FIXED))
    return pointwise(call, [replace(x, layers=tuple(inside)), *_aligned(call, len(x.shape))])


def layer_norm(call: Call) -> Any:
    """Layer norm and RMS norm: channels and their gains leave together; the statistics are of those that are left."""
    x, rank = call.get("input"), len(call.get("input").shape)
    normalised = frozenset(range(rank - len(call.get("normalized_shape")), rank))
    if call.get("weight") is None:
        call.free(x.layers, normalised, f"{NORMALISES}, without weights that say which are kept")
        return call.result(x.layers)  # pinned labels go on, so that what is added later names this reason
    return pointwise(call, [value for value in call.values() if isinstance(value, Value)])


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
    statistic = call.name == "mean" and call.get("keepdim", False) and call.feeds & {"rsqrt", "sqrt"}
    # the statistic of a norm written by hand is taken over the channels that stay, as in `layer_norm`
    passing = [layer for layer in x.layers if not varying(layer) & dims]
    kept = passing if statistic else call.free(x.layers, dims, "over its channels")
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
