"""Weight-only quantization: integer codes of 2 to 8 bits with a scale a channel, a tensor or a group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import nn

from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.attention import attention_swaps
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.swaps import quantizable, quantized_swap


@final
@dataclass(frozen=True)
class QuantizeWeights(Technique):
    """Store the weights of every layer that has a matrix as integers; activations stay float.

    These are linear layers, convolutions, transposed ones too, embeddings (a scale a row), attention and recurrent layers;
    the last two are first taken apart into linear layers. The step is the one with the least squared error. Follow it with
    `distill` for quantization-aware training. `group` gives every so many consecutive inputs of a row of a linear layer a
    scale of their own, whatever `per_channel` says, for 2 and 3 bits; it costs 32 bits in memory and about 12 in the file for each.

    Paper: Gholami et al., "A Survey of Quantization Methods for Efficient Neural Network Inference", 2021; groups: Frantar
        et al., "GPTQ", ICLR 2023.
    Use when: bytes on disk matter more than speed.
    Costs: one pass over each tensor; at 4 bits and below heal afterwards.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    bits: int = setting(4, low=2, high=8)
    per_channel: bool = setting(True)
    group: int = setting(0, low=0, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, and before them one for each attention and recurrent layer."""
        yield from attention_swaps(model, context)
        yield from recurrent_swaps(model, context)
        per_channel = self.per_channel or self.group > 0
        for path, layer in quantizable(model, context, self.bits, per_channel, self.group):
            yield quantized_swap(path, layer, self.bits, per_channel, group=self.group)

    def mildest(self) -> Technique:
        """Return 8 bits a channel."""
        return QuantizeWeights(bits=8)
