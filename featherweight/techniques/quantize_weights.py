"""Weight-only quantization: integer codes of 2 to 8 bits with a scale a channel or a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers.plain import convolution_options
from featherweight.layers.quantized import round_mantissa, significant_bits
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.techniques.targets import untied

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
        for path, layer in untied(model, context, *QUANTIZABLE):
            if getattr(layer, "padding_mode", "zeros") != "zeros":
                context.leave(path, f"padding mode {layer.padding_mode!r} is not quantized")
                continue
            yield quantized_swap(path, layer, self.bits, self.per_channel)

    def mildest(self) -> Technique:
        """Return 8 bits a channel."""
        return QuantizeWeights(bits=8)


def quantized_swap(
    path: str, layer: nn.Module, bits: int, per_channel: bool, grids: dict[str, Tensor] | None = None
) -> Swap:
    """Return the Swap of a linear or convolution layer by its quantized kind.

    Args:
        path: where the layer is.
        layer: an `nn.Linear` or `nn.Conv1d/2d/3d`.
        bits: width of the codes.
        per_channel: one scale for each output channel, or one in all.
        grids: `input_scale`, `input_zero` and, if the output is quantized too, `output_scale`, `output_zero`.
    """
    grids = grids or {}
    weight = layer.get_parameter("weight")
    scale = grid_scale(weight, bits, per_channel)
    state = {"codes": to_codes(weight, scale, bits), "scale": scale, **grids}
    if isinstance(layer.bias, Tensor):
        state["bias"] = round_mantissa(layer.bias.detach(), significant_bits(bits))
    shared = {
        "bits": bits,
        "bias": isinstance(layer.bias, Tensor),
        "per_channel": per_channel,
        "input_grid": "input_scale" in grids,
        "output_grid": "output_scale" in grids,
    }
    if isinstance(layer, nn.Linear):
        options = {"in_features": layer.in_features, "out_features": layer.out_features, **shared}
        return Swap(path, "quantized_linear", options, state)
    return Swap(path, "quantized_convolution", {**convolution_options(layer), **shared}, state)  # type: ignore[arg-type]
