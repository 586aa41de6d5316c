"""Swap a float layer for its quantized kind: which layers can be, which pay, and the edit itself."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers.plain import convolution_options
from featherweight.layers.quantized import round_mantissa, significant_bits
from featherweight.technique import Context
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.techniques.targets import untied

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def quantizable(model: nn.Module, context: Context, bits: int, per_channel: bool) -> list[tuple[str, nn.Module]]:
    """Return `(path, layer)` of the layers in scope that can be quantized and get smaller; the others are recorded.

    Args:
        model: the model as it stands.
        context: its scope, and where to record.
        bits: width of the codes.
        per_channel: one float32 scale for each output channel, or one in all.
    """
    found: list[tuple[str, nn.Module]] = []
    for path, layer in untied(model, context, *_LAYERS):
        weight = layer.get_parameter("weight")
        scales = weight.shape[0] if per_channel else 1
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            context.leave(path, f"padding mode {layer.padding_mode!r} is not quantized")
        elif bits * weight.numel() + 32 * scales >= 32 * weight.numel():
            context.leave(path, f"{scales} scales would outweigh what {weight.numel()} weights of {bits} bits save")
        else:
            found.append((path, layer))
    return found


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
