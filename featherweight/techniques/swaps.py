"""Swap a float layer for its quantized kind: which layers can be, which pay, and the edit itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers import QuantizedLayer, build
from featherweight.layers.plain import convolution_options
from featherweight.layers.quantized import round_together, significant_bits
from featherweight.technique import Context
from featherweight.techniques.rounding import grid_scale
from featherweight.techniques.targets import untied

COMPUTING: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose quantized kind can have grids for its activations too."""
STORING: tuple[type[nn.Module], ...] = (nn.Embedding, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose quantized kind stores codes and computes with floats."""


def quantizable(
    model: nn.Module,
    context: Context,
    bits: int,
    per_channel: bool,
    group: int = 0,
    types: tuple[type[nn.Module], ...] = (*COMPUTING, *STORING),
) -> list[tuple[str, nn.Module]]:
    """Return `(path, layer)` of the layers in scope that can be quantized and get smaller; the others are recorded.

    Args:
        model: the model as it stands.
        context: its scope, and where to record.
        bits: width of the codes.
        per_channel: one float32 scale for each output channel, or one in all.
        group: inputs of a row of a linear layer that share a scale; 0 for all of them.
        types: the types wanted, of `COMPUTING` and `STORING`.
    """
    found: list[tuple[str, nn.Module]] = []
    for path, layer in untied(model, context, *types):
        weight, scales = layer.get_parameter("weight"), fresh_kind(layer, bits, per_channel, group)[2].scale.numel()
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            context.leave(path, f"padding mode {layer.padding_mode!r} is not quantized")
        elif getattr(layer, "max_norm", None) is not None:
            context.leave(path, "an embedding with max_norm changes its rows at each forward, and codes cannot follow")
        elif bits * weight.numel() + 32 * scales >= 32 * weight.numel():
            context.leave(path, f"{scales} scales would outweigh what {weight.numel()} weights of {bits} bits save")
        else:
            found.append((path, layer))
    return found


def quantized_swap(
    path: str,
    layer: nn.Module,
    bits: int,
    per_channel: bool,
    grids: dict[str, Tensor] | None = None,
    group: int = 0,
    scale: Tensor | None = None,
    codes: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    **grid: Any,
) -> Swap:
    """Return the Swap of a layer by its quantized kind.

    Args:
        path: where the layer is.
        layer: of a type in `COMPUTING` or `STORING`.
        bits: width of the codes.
        per_channel: one scale for each output channel, each row of an embedding, or one in all.
        grids: of a layer in `COMPUTING`: `input_scale`, `input_zero` and, if the output is quantized too, `output_scale`,
            `output_zero`.
        group: inputs of a row of a linear layer that share a scale; 0 for all of them.
        scale: the steps, one for each scale of the kind; those of least squared error when None.
        codes: shaped like the weight; the nearest when None.
        bias: of a layer that has one, another in its place.
        mean: of each channel that enters a layer in `COMPUTING`, `[in]`; the bias then takes what rounding changes in the mean output
            (Nagel et al., "Data-Free Quantization", ICCV 2019).
        grid: options of `QuantizedLayer` that are not its defaults: `full`, `input_bits`, `input_signs`, `gradient`.
    """
    grids = grids or {}
    kind, options, fresh = fresh_kind(layer, bits, per_channel, group, grids, grid)
    weight = layer.get_parameter("weight").detach()
    if scale is None:
        scale = grid_scale(fresh.rows(weight), bits, per_channel=True, full=fresh.full).reshape(fresh.scale.shape)
    codes = fresh.nearest(weight / fresh.steps(scale)) if codes is None else codes.to(weight.device)
    state = {"codes": codes.to(torch.int8), "scale": scale.to(weight.device), **grids}
    own = getattr(layer, "bias", None)
    if isinstance(own, Tensor):
        if bias is None and mean is not None:
            bias = own.detach() + _mean_output(weight - codes * fresh.steps(scale), mean)
        state["bias"] = round_together(own.detach() if bias is None else bias.to(own), significant_bits(bits))
    return Swap(path, kind, options, state)


def _mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """What a linear layer or a convolution of this weight gives on average, `[out]`, for inputs with this mean, padding apart."""
    rows = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    groups = len(mean) // rows.shape[1]
    by_group = rows.reshape(groups, -1, rows.shape[1]) @ mean.to(rows).reshape(groups, -1, 1)
    return by_group.flatten()


def fresh_kind(
    layer: nn.Module,
    bits: int,
    per_channel: bool,
    group: int,
    grids: dict[str, Tensor] | None = None,
    grid: dict[str, Any] | None = None,
) -> tuple[str, dict[str, Any], QuantizedLayer]:
    """Return the quantized kind of a layer, its options, and one without values, which knows what shares a scale."""
    kind, options = _kind(layer)
    options |= {"bits": bits}
    if not isinstance(layer, nn.Embedding):
        options |= {"bias": isinstance(layer.bias, Tensor)}
    options |= {"per_channel": per_channel}
    if isinstance(layer, COMPUTING):
        options |= {"input_grid": "input_scale" in (grids or {}), "output_grid": "output_scale" in (grids or {})}
    if isinstance(layer, nn.Linear) and 0 < group < layer.in_features:
        options |= {"group": group}
    options |= grid or {}
    with torch.device("meta"):
        fresh = build(kind, options)
    if not isinstance(fresh, QuantizedLayer):
        raise TypeError(f"{kind} is no quantized kind")
    return kind, options, fresh


def _kind(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    """The kind of a layer and the options that say its shape."""
    if isinstance(layer, nn.Linear):
        return "quantized_linear", {"in_features": layer.in_features, "out_features": layer.out_features}
    if isinstance(layer, nn.Embedding):
        rows, width = layer.weight.shape
        padding = {} if layer.padding_idx is None else {"padding_idx": layer.padding_idx}
        return "quantized_embedding", {"num_embeddings": rows, "embedding_dim": width, **padding}
    options = dict(convolution_options(layer))  # type: ignore[arg-type]
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "quantized_transposed_convolution", options | {"output_padding": list(layer.output_padding)}
    return "quantized_convolution", options
