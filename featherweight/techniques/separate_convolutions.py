"""Depthwise-separable convolutions in place of dense ones, with the weights that come nearest."""

from __future__ import annotations

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
class SeparateConvolutions(Technique):
    """Replace each dense convolution by a depthwise and a pointwise one, the pair whose weights are nearest to its own.

    For each input channel the weights `[out, kernel]` become their best outer product, a filter times a column, from a
    singular value decomposition. Layers of fewer than `minimum` input channels, such as the first, stay dense; so do
    pointwise, grouped and specially padded ones, and those that would not get smaller.

    Paper: Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC 2018; the pair: Howard et
        al., "MobileNets", 2017.
    Use when: a student is made out of a network of dense convolutions; it costs much accuracy, so distil long afterwards.
    Costs: one small decomposition for each input channel.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    minimum: int = setting(8, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each convolution that gets smaller."""
        for path, layer in untied(model, context, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            reason = refusal(layer, self.minimum)
            if reason:
                context.leave(path, reason)
            else:
                yield separable_swap(path, layer)


def refusal(layer: nn.modules.conv._ConvNd, minimum: int) -> str:
    """Return why a convolution is not separated, or an empty string; it is not below `minimum` input channels."""
    outputs, inputs, places = layer.weight.shape[0], layer.weight.shape[1], layer.weight[0, 0].numel()
    if layer.groups > 1:
        return f"it has {layer.groups} groups and is not dense"
    if layer.padding_mode != "zeros":
        return f"padding mode {layer.padding_mode!r} is not separated"
    if inputs < minimum:
        return f"{inputs} input channels are fewer than {minimum}"
    before, after = outputs * inputs * places, inputs * (places + outputs)
    return f"a separable pair has {after} weights and not fewer than {before}" if after >= before else ""


def separable_swap(path: str, layer: nn.modules.conv._ConvNd) -> Swap:
    """Return the Swap of a dense convolution at a path by the nearest depthwise and pointwise pair."""
    described = convolution_options(layer)  # type: ignore[arg-type]
    options = {key: value for key, value in described.items() if key != "groups"}
    depthwise, pointwise = _nearest_pair(layer.weight.detach())
    state = {"0.weight": depthwise, "1.weight": pointwise}
    if layer.bias is not None:
        state["1.bias"] = layer.bias.detach().clone()
    return Swap(path, "depthwise_separable_convolution", {**options, "bias": layer.bias is not None}, state)


def _nearest_pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    """From `[out, in, ...]` the filters `[in, 1, ...]` and the pointwise weights `[out, in, 1, ...]` of least squared error."""
    outputs, inputs, *kernel = weight.shape
    left, values, right = torch.linalg.svd(weight.flatten(2).transpose(0, 1).double(), full_matrices=False)
    root = values[:, :1].sqrt()
    filters = (root * right[:, 0]).reshape(inputs, 1, *kernel)
    columns = (root * left[:, :, 0]).t().reshape(outputs, inputs, *[1] * len(kernel))
    return filters.to(weight.dtype), columns.to(weight.dtype)
