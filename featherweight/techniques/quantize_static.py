"""Static int8: integer weights and calibrated 8-bit activations, which runtimes compute as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.data import as_call, example_inputs
from featherweight.errors import ModelError
from featherweight.layers import SplitRecurrent
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.observe import observe, unsigned_grid
from featherweight.techniques.swaps import COMPUTING, STORING, quantizable, quantized_swap
from featherweight.techniques.targets import first_paths
from featherweight.trace import module_path, trace

aten = torch.ops.aten
_TRANSPARENT = {aten.relu.default, aten.relu_.default, aten.dropout.default}
_OTHERS = "only linear and convolution layers have integer activations; quantize_weights quantizes its weights"
_COMPUTE = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}


@final
@dataclass(frozen=True)
class QuantizeStatic(Technique):
    """Quantize weights per channel to 8 bits and inputs to calibrated unsigned 8-bit grids.

    Where a layer's output goes, through ReLU alone, into another quantized layer, that layer's input grid serves as its
    output grid; anywhere else it gets a grid of its own, because ONNX Runtime computes integers only between two grids.
    The network's outputs stay float.

    Paper: Jacob et al., CVPR 2018; ranges by squared error: Nagel et al., "A White Paper on Neural Network Quantization", 2021.
    Use when: speed on a CPU with integer instructions, and a file of a quarter.
    Costs: `batches` forward passes on calibration data.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    range: str = setting("mse", choices=("mse", "minmax"))
    batches: int = setting(8, low=1, high=100_000)
    weight_bits: int = setting(8, low=2, high=8)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, with its grids."""
        layers = _computing(model, context, self.weight_bits)
        entered, left = observe(model, context, [path for path, _ in layers], self.batches)
        inner = _need_output_grid(model, context, {path for path, _ in layers})
        for path, layer in layers:
            if path not in entered:
                context.leave(path, "calibration data never reached it")
                continue
            grids: dict[str, Tensor] = dict(
                zip(("input_scale", "input_zero"), unsigned_grid(entered[path], self.range), strict=True)
            )
            if path in inner:
                grids |= zip(("output_scale", "output_zero"), unsigned_grid(left[path], self.range), strict=True)
            yield quantized_swap(path, layer, self.weight_bits, True, grids)

    def mildest(self) -> Technique:
        """Return the default, 8 bits."""
        return QuantizeStatic()


def _computing(model: nn.Module, context: Context, bits: int) -> list[tuple[str, nn.Module]]:
    """The linear and convolution layers that take activations; the others are recorded."""
    split = [path for path, module in model.named_modules() if isinstance(module, SplitRecurrent)]
    inside = [f"{path}.".lstrip(".") for path in split]
    for path, _ in context.targets(model, *STORING, nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention):
        context.leave(path, _OTHERS)
    for path in filter(context.in_scope, split):
        context.leave(path, _OTHERS)
    found = quantizable(model, context, bits, per_channel=True, types=COMPUTING)
    return [(path, layer) for path, layer in found if not path.startswith(tuple(inside))]


def _need_output_grid(model: nn.Module, context: Context, quantized: set[str]) -> set[str]:
    """Paths of layers whose output feeds something that is neither another quantized layer nor the model's output."""
    try:
        graph = trace(model, *as_call(example_inputs(context.data, context.device))).graph
    except ModelError:
        return set()
    first = first_paths(model)
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.target in _COMPUTE and first[module_path(node)] in quantized:
            ends = [_end(user) for user in node.users]
            if not all(
                (end.target in _COMPUTE and first[module_path(end)] in quantized) or end.op == "output" for end in ends
            ):
                wanted.add(first[module_path(node)])
    return wanted


def _end(node: Node) -> Node:
    """The first node on the way of a value that is not a ReLU with a single user."""
    while node.target in _TRANSPARENT and len(node.users) == 1:
        node = next(iter(node.users))
    return node
