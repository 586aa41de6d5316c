"""Factor linear layers and convolutions by a truncated singular value decomposition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers.plain import convolution_options
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.targets import untied


@final
@dataclass(frozen=True)
class LowRank(Technique):
    """Replace `W [out, in]` by `A [out, r] B [r, in]`, the rank chosen by the energy it keeps; convolutions by channels.

    A layer whose factors would not be smaller than itself is left dense. Grouped convolutions are left alone.

    Paper: Eckart & Young, 1936; Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and
        Detection", TPAMI 2016 (a k x k convolution to r channels, then a pointwise one).
    Use when: layers are wide and the target computes dense matrices; heal with `distill` afterwards.
    Costs: one decomposition a layer, no data.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    energy: float = setting(0.9, low=0.01, high=1.0)
    multiple: int = setting(1, low=1, high=64)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap by two layers in a row for each layer that gets smaller."""
        targets = untied(model, context, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        for path, layer in targets:
            if getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
                context.leave(path, "a grouped or specially padded convolution is not factored")
                continue
            weight = layer.get_parameter("weight").detach()
            matrix = weight.flatten(1).double()
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            rank = self._rank(values)
            if rank * sum(matrix.shape) >= matrix.numel():
                context.leave(path, f"rank {rank} keeps {self.energy:.0%} of the energy and would not be smaller")
                continue
            root = values[:rank].sqrt()
            yield _factored(path, layer, left[:, :rank] * root, root[:, None] * right[:rank], weight)

    def _rank(self, values: Tensor) -> int:
        energy = (values**2).cumsum(0)
        wanted = int((energy < self.energy * energy[-1]).sum()) + 1
        return min(len(values), math.ceil(wanted / self.multiple) * self.multiple)


def _factored(path: str, layer: nn.Module, out: Tensor, inner: Tensor, weight: Tensor) -> Swap:
    """Return the Swap by `inner [rank, in * taps]` then `out [out, rank]`."""
    rank = out.shape[1]
    state = {"0.weight": inner.reshape(rank, *weight.shape[1:]).to(weight.dtype), "1.weight": out.to(weight.dtype)}
    if isinstance(layer.bias, Tensor):
        state["1.bias"] = layer.bias.detach()
    if isinstance(layer, nn.Linear):
        options = {"in_features": layer.in_features, "rank": rank, "out_features": layer.out_features}
        kind = "factored_linear"
    else:
        options = {**convolution_options(layer), "rank": rank}  # type: ignore[arg-type,dict-item]
        del options["groups"]
        kind = "factored_convolution"
        state["1.weight"] = state["1.weight"].reshape(*out.shape, *[1] * (weight.dim() - 2))
    return Swap(path, kind, {**options, "bias": isinstance(layer.bias, Tensor)}, state)
