"""Quantization-aware training: layers become quantized ones with calibrated inputs, and their float latents are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import example_inputs, forward
from featherweight.edits import Write
from featherweight.errors import RecipeError
from featherweight.layers import QuantizedConv, QuantizedLayer, QuantizedLinear, SplitRecurrent
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.guidance import Guidance
from featherweight.techniques.observe import observe
from featherweight.techniques.ranges import unsigned_grid
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.swaps import COMPUTING, quantizable, quantized_swap
from featherweight.techniques.train import Training, fit

_SETTLE = 1 / 3  # of the epochs, in which batch norms keep their statistics
_EDGE_INPUT = 8  # bits of the inputs of the first and the last layer


@dataclass(frozen=True)
class Widths:
    """What layers are quantized to.

    Attributes:
        bits: of weights, 1 to 8; 1 is signs.
        activations: of the inputs of linear layers and convolutions, 1 to 8, or 0 to leave them float.
        edges: bits of the weights of the first and the last of these layers; their inputs have 8, if not float.
        batches: calibration batches for the ranges of inputs.
        grid: options of `QuantizedLayer` for all but the first and the last.
    """

    bits: int
    activations: int = 0
    edges: int = 8
    batches: int = 8
    grid: Mapping[str, Any] = field(default_factory=dict)


def train_quantized(
    model: nn.Module, context: Context, widths: Widths, training: Training, guidance: Guidance | None = None
) -> Edits:
    """Yield a Swap for each float layer, train all quantized layers in scope in place, and yield one Write that says so.

    Layers that are quantized already are trained as they are, so that a recipe can put any post-training technique in
    front. Training starts from the float weights, whose codes are the post-training ones, and returns the best epoch on
    validation data, that start included.

    Args:
        model: changed in place.
        context: data, teacher, scope; layers left alone are recorded.
        widths: what to quantize to.
        training: how long and how.
        guidance: how the teacher is followed; its soft targets, with a fixed weight, when None.

    Raises:
        RecipeError: zeros that must stay would become signs.
    """
    yield from layer_swaps(model, context)
    yield from recurrent_swaps(model, context)
    _record_float_inputs(model, context, widths)
    ends = _ends(model, context)
    found = quantizable(model, context, widths.bits, per_channel=True)
    grids = _input_grids(model, context, found, ends, widths)
    latents: dict[str, Tensor] = {}
    for path, layer in found:
        weight = layer.get_parameter("weight").detach().clone()
        bits = widths.edges if path in ends else widths.bits
        grid = {} if path in ends else dict(widths.grid)
        if bits == 1 and f"{path}.weight".lstrip(".") in context.sparse:
            raise RecipeError(
                f"the zeros of {path}.weight must stay, and binary weights have none: take ternarize_weights, which keeps them"
            )
        if path in grids and path not in ends and widths.activations < 8:
            grid |= {"input_bits": widths.activations}
            grid |= {"input_signs": True} if widths.activations == 1 and int(grids[path]["input_zero"]) else {}
        if (yield quantized_swap(path, layer, bits, True, grids.get(path), **grid)):
            latents[f"{path}.weight".lstrip(".")] = weight
    if not any(isinstance(layer, QuantizedLayer) and context.in_scope(path) for path, layer in model.named_modules()):
        context.leave("", "no quantized layer is in scope")
        return
    # few labels are learnt by heart without dropout; to a teacher that drops nothing it adds more than rounding does
    labels = training.teacher_share < 1 or context.teacher is None
    fit(model, context, training, guidance=guidance, latents=latents, settle=_SETTLE, dropout=labels)
    yield Write(None)


def _record_float_inputs(model: nn.Module, context: Context, widths: Widths) -> None:
    for path, layer in model.named_modules():
        computes = isinstance(layer, QuantizedLinear | QuantizedConv) and context.in_scope(path)
        if widths.activations and computes and not layer.input_grid:
            context.leave(path, "its input stays float: an earlier step has quantized it without")


def _ends(model: nn.Module, context: Context) -> set[str]:
    """Paths of the first and the last linear or convolutional layer that a forward calls."""
    called: list[str] = []
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, COMPUTING)]
    handles = [layer.register_forward_pre_hook(lambda *_, path=path: called.append(path)) for path, layer in layers]
    try:
        with evaluating(model):
            forward(model, example_inputs(context.data, context.device))
    finally:
        for handle in handles:
            handle.remove()
    return {called[0], called[-1]} if called else set()


def _input_grids(
    model: nn.Module, context: Context, found: list[tuple[str, nn.Module]], ends: set[str], widths: Widths
) -> dict[str, dict[str, Tensor]]:
    """The calibrated grid of the input of each layer that can have one; the others are recorded. The zero of signs is 1."""
    if not widths.activations:
        return {}
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SplitRecurrent))
    paths = []
    for path, layer in found:
        if path.startswith(inside):
            context.leave(path, "its input stays float: a recurrent kernel computes with float states")
        elif isinstance(layer, COMPUTING):
            paths.append(path)
    entered, _, _ = observe(model, context, paths, widths.batches)
    grids = {}
    for path in paths:
        if path not in entered:
            context.leave(path, "its input stays float: calibration data never reached it")
            continue
        bits = _EDGE_INPUT if path in ends else widths.activations
        scale, zero = unsigned_grid(entered[path], "mse", bits)
        if bits == 1 and entered[path].low < 0:
            scale, zero = entered[path].sample.abs().mean(), torch.ones_like(zero)
        grids[path] = {"input_scale": scale, "input_zero": zero}
    return grids
