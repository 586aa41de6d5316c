"""Weight-only quantization: integer codes of 2 to 8 bits with a scale a channel or a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.swaps import quantizable, quantized_swap


@final
@dataclass(frozen=True)
class QuantizeWeights(Technique):
    """Store the weights of linear and convolution layers as integers; activations stay float.

    The step is the one with the least squared error. Follow it with `distill` for quantization-aware training.

    Paper: Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference", 2021.
    Use when: bytes on disk matter more than speed.
    Costs: one pass over each tensor; at 4 bits and below heal afterwards.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    bits: int = setting(4, low=2, high=8)
    per_channel: bool = setting(True)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer."""
        for path, layer in quantizable(model, context, self.bits, self.per_channel):
            yield quantized_swap(path, layer, self.bits, self.per_channel)

    def mildest(self) -> Technique:
        """Return 8 bits a channel."""
        return QuantizeWeights(bits=8)
