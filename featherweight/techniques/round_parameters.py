"""Round what no layer holds as codes: parameters that the model uses as they are, to a few even steps each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import nn

from featherweight.edits import Write
from featherweight.layers.quantized import QuantizedLayer
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.rounding import grid_scale, to_codes


@final
@dataclass(frozen=True)
class RoundParameters(Technique):
    """Round every parameter of two dimensions or more that is still float to a grid of its own, which the file's coder finds.

    That is what `quantize_weights` cannot reach: position tables, batched experts, matrices that a forward multiplies with by
    itself, weights of layers that it does not know. Vectors stay as they are. The model computes with floats as before; the file gets
    smaller. Training moves values off the grid again, so let none follow.

    Paper: Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference", 2021, section 3.
    Use when: last, where a model has such parameters: the position table of DeiT-Tiny would be an eighth of a file
        20 times smaller.
    Costs: one pass over each parameter.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    bits: int = setting(8, low=2, high=8)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write of all of them."""
        rounded = {}
        for name, parameter in unrounded(model):
            if not context.in_scope(name):
                continue
            value = parameter.detach()
            if torch.unique(value).numel() <= 2**self.bits:
                context.leave(name, f"it has no more than {2**self.bits} different values already")
                continue
            scale = grid_scale(value, self.bits, per_channel=False)
            rounded[name] = (to_codes(value, scale, self.bits) * scale).to(value.dtype)
        if rounded:
            yield Write(rounded)


def unrounded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield float parameters with two dimensions or more of several entries, each once, but for those of quantized layers."""
    quantized = {
        id(value) for layer in model.modules() if isinstance(layer, QuantizedLayer) for value in layer.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in quantized and sum(n > 1 for n in parameter.shape) > 1:
            yield name, parameter
