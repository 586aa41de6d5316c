"""Write large layers as products of small tensors: far fewer parameters than low rank can have, at a price to heal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers.plain import convolution_options
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.targets import untied
from featherweight.techniques.tensor_forms import (
    balanced,
    block_factors,
    bonds,
    canonical_factors,
    circulant_waves,
    train_cores,
)

_CORES = {"kronecker": 2, "tensor_train": 3}
_SWEEPS = 40


@final
@dataclass(frozen=True)
class FactorTensors(Technique):
    """Replace each large layer by the nearest product of small tensors that has a share `ratio` fewer parameters.

    `kronecker` makes a linear layer a sum of Kronecker products, `tensor_train` a train of three cores, and an embedding
    too; `groups` two block-diagonal matrices with a shuffle between them, low-rank blocks in all; `circulant` blocks whose
    rows are one row moved around; `canonical` makes a two-dimensional convolution a pointwise one, a column, a row and a
    pointwise one. Ranks are the largest, and circulant blocks the smallest, that the ratio allows. Attention and recurrent
    layers are first taken apart into linear layers; in a runtime, recurrent matrices are multiplied out once, at load, so
    there it saves bytes and no time. Layers of fewer than `minimum` weights stay.

    Paper: Thakker et al., "Compressing RNNs for IoT devices by 15-38x using Kronecker Products", 2019; Novikov et al.,
        "Tensorizing Neural Networks", NeurIPS 2015; Rajbhandari et al., "AntMan", 2019 (groups); Cheng et al., ICCV 2015
        (circulant); Lebedev et al., ICLR 2015 (canonical).
    Use when: very few bytes are wanted of very large layers; the start is far from the original, so heal with many epochs.
    Costs: a few decompositions a layer; what runs afterwards are several small products, seldom faster than one dense one
        but for `groups` from 512 wide on and `circulant` from 1,024.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    form: str = setting("kronecker", choices=("kronecker", "tensor_train", "groups", "circulant", "canonical"))
    ratio: float = setting(0.8, low=0.01, high=0.9999)
    groups: int = setting(4, low=2, high=1024)
    minimum: int = setting(1024, low=4, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer that can take the form, and before them one for each attention and recurrent layer."""
        types: tuple[type[nn.Module], ...] = (nn.Conv2d,)
        if self.form != "canonical":
            yield from layer_swaps(model, context)
            yield from recurrent_swaps(model, context)
            types = (nn.Linear, nn.Embedding) if self.form == "tensor_train" else (nn.Linear,)
        for path, layer in untied(model, context, *types):
            weight = layer.get_parameter("weight").detach()
            if weight.numel() < self.minimum:
                context.leave(path, f"{weight.numel()} weights are fewer than {self.minimum}")
                continue
            made = self._made(path, layer, weight.double(), context)
            if isinstance(made, str):
                context.leave(path, made)
                continue
            kind, options, state = made
            bias = getattr(layer, "bias", None)
            if isinstance(bias, Tensor):
                state["3.bias" if kind == "canonical_convolution" else "bias"] = bias.detach()
            yield Swap(path, kind, options, {name: value.to(weight.dtype) for name, value in state.items()})

    def _made(
        self, path: str, layer: nn.Module, weight: Tensor, context: Context
    ) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
        """Kind, options and weights of what takes a layer's place, or why nothing can."""
        allowed = (1 - self.ratio) * weight.numel()
        if isinstance(layer, nn.Conv2d):
            return _canonical(layer, weight, allowed, context.rng(path))
        if isinstance(layer, nn.Embedding):
            return _embedding(layer, weight, allowed)
        if self.form == "groups":
            return _blocks(weight, allowed, self.groups, layer.bias is not None)
        if self.form == "circulant":
            return _circulant(weight, allowed, layer.bias is not None)
        return _train(weight, allowed, _CORES[self.form], layer.bias is not None)


def _canonical(
    layer: nn.Conv2d, weight: Tensor, allowed: float, generator: torch.Generator
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    if layer.groups != 1 or layer.padding_mode != "zeros":
        return "a grouped or specially padded convolution is not factored"
    rank = int(allowed // sum(weight.shape))
    if rank < 1:
        return f"one canonical term has {sum(weight.shape)} weights, more than the {allowed:.0f} that would stay"
    out, inside, tall, wide = canonical_factors(weight, rank, _SWEEPS, generator)
    options = {**convolution_options(layer), "rank": rank, "bias": layer.bias is not None}
    del options["groups"]
    state = {
        "0.weight": inside.T[:, :, None, None],
        "1.weight": tall.T[:, None, :, None],
        "2.weight": wide.T[:, None, None, :],
        "3.weight": out[:, :, None, None],
    }
    return "canonical_convolution", options, state


def _embedding(
    layer: nn.Embedding, weight: Tensor, allowed: float
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    if layer.padding_idx is not None or layer.max_norm is not None:
        return "rows of an embedding with a padding index or a largest norm are not products"
    rows, width = weight.shape
    row_shape, out_shape = [math.ceil(rows ** (1 / 3))] * 3, balanced(width, 3)
    if out_shape is None:
        return f"a width of {width} is no product of three numbers"
    sizes = [row * out for row, out in zip(row_shape, out_shape, strict=True)]
    ranks = _largest(sizes, allowed)
    if ranks is None:
        return f"a train of rank 1 has {sum(sizes)} weights, more than the {allowed:.0f} that would stay"
    filled = torch.cat((weight, weight.new_zeros(math.prod(row_shape) - rows, width)))
    cores = train_cores(_interleaved(filled, row_shape, out_shape), max(ranks))
    state = {
        f"cores.{place}.weight": core.reshape(len(core), row, -1).transpose(0, 1).reshape(row, -1)
        for place, (core, row) in enumerate(zip(cores, row_shape, strict=True))
    }
    return (
        "tensor_train_embedding",
        {"row_shape": row_shape, "out_shape": out_shape, "ranks": ranks, "num_embeddings": rows},
        state,
    )


def _train(
    weight: Tensor, allowed: float, count: int, bias: bool
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    out, inside = weight.shape
    out_shape, in_shape = balanced(out, count), balanced(inside, count)
    if out_shape is None or in_shape is None:
        return f"{out} or {inside} is no product of {count} numbers"
    sizes = [m * n for m, n in zip(out_shape, in_shape, strict=True)]
    ranks = _largest(sizes, allowed)
    if ranks is None:
        return f"one product of {count} cores has {sum(sizes)} weights, more than the {allowed:.0f} that would stay"
    cores = train_cores(_interleaved(weight, out_shape, in_shape), max(ranks))
    state = {}
    for place, (core, m, n) in enumerate(zip(cores, out_shape, in_shape, strict=True)):
        before, _, after = core.shape
        state[f"cores.{place}.weight"] = core.reshape(before * m, n * after)
    return "tensor_train_linear", {"in_shape": in_shape, "out_shape": out_shape, "ranks": ranks, "bias": bias}, state


def _blocks(
    weight: Tensor, allowed: float, groups: int, bias: bool
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    out, inside = weight.shape
    if out % groups or inside % groups:
        return f"{out} or {inside} is no multiple of {groups} groups"
    rank = min(int(allowed // (groups * (out + inside))), out // groups, inside // groups)
    if rank < 1:
        return f"blocks of rank 1 have {groups * (out + inside)} weights, more than the {allowed:.0f} that would stay"
    first, second = block_factors(weight, groups, rank)
    options = {"in_features": inside, "out_features": out, "groups": groups, "rank": rank, "bias": bias}
    return "group_linear", options, {"first.weight": first[:, :, None], "second.weight": second[:, :, None]}


def _circulant(weight: Tensor, allowed: float, bias: bool) -> tuple[str, dict[str, Any], dict[str, Tensor]] | str:
    out, inside = weight.shape
    for block in range(2, math.gcd(out, inside) + 1):
        if out % block or inside % block or 2 * (block // 2 + 1) * (out // block) * (inside // block) > allowed:
            continue
        real, imaginary = circulant_waves(weight, block)
        options = {"in_features": inside, "out_features": out, "block": block, "bias": bias}
        return "circulant_linear", options, {"real.weight": real[:, :, None], "imaginary.weight": imaginary[:, :, None]}
    return f"no block that divides {out} and {inside} leaves at most {allowed:.0f} weights"


def _interleaved(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """The matrix `[rows, columns]` as `[row_1 column_1, ..., row_d column_d]`."""
    count = len(rows)
    order = [side for place in range(count) for side in (place, count + place)]
    sizes = [row * column for row, column in zip(rows, columns, strict=True)]
    return matrix.reshape(*rows, *columns).permute(order).reshape(sizes)


def _largest(sizes: list[int], allowed: float) -> list[int] | None:
    """The ranks of the largest train of at most `allowed` parameters, or None where not even ranks of 1 fit."""
    best: list[int] | None = None
    for rank in range(1, max(sizes) + 1):
        ranks = bonds(sizes, rank)
        inner = [1, *ranks, 1]
        if sum(inner[place] * size * inner[place + 1] for place, size in enumerate(sizes)) > allowed or ranks == best:
            break
        best = ranks
    return best
