"""Static int8: integer weights and calibrated 8-bit activations, which runtimes compute as integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.data import as_call, example_inputs
from featherweight.errors import ModelError
from featherweight.layers.recurrent import SplitLSTM
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.damage import Damage
from featherweight.techniques.guard import guarded
from featherweight.techniques.observe import Observed, observe
from featherweight.techniques.ranges import METHODS, centred, unsigned_grid
from featherweight.techniques.recurrent import recurrent_moments, recurrent_swaps
from featherweight.techniques.sequential import inside_recurrent, sequential_swaps
from featherweight.techniques.swaps import COMPUTING, quantizable, quantized_swap
from featherweight.techniques.targets import first_paths
from featherweight.trace import module_path, trace

aten = torch.ops.aten
_GUARDED = 4  # batches whose outputs are compared
_TRANSPARENT = {
    *(aten.relu.default, aten.relu_.default, aten.dropout.default),
    # what they cut off lies outside the grid behind them, so that runtimes leave them out
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.clamp.default, aten.clamp_.default),
}
_WEIGHTS_ALONE = "integer weights alone: no runtime computes it on integer activations of a fixed grid"
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_COMPUTE = {*_CONVOLUTIONS, aten.linear.default}
_ZEROS = (
    (),
    ("constant",),
    ("constant", None),
    ("constant", 0),
    ("constant", 0.0),
)  # how a padding says that it adds them


@final
@dataclass(frozen=True)
class QuantizeStatic(Technique):
    """Quantize weights per channel to 8 bits and inputs to calibrated unsigned 8-bit grids.

    Where a layer's output goes, through ReLU, a clip, a maximum or added zeros alone, into another quantized layer, that layer's
    input grid serves as its output grid; anywhere else a convolution gets a grid of its own, because ONNX Runtime computes it with integers
    only between two grids. Linear layers need none, and their outputs, such as those that enter a layer norm, stay float. The zero of
    an input grid is its middle code where steps grow by a sixteenth at most for it: integer kernels are faster then.
    The network's outputs stay float. Biases take what rounding changes in the mean output. Attention is first taken apart into
    linear layers. What enters an LSTM is rounded, and its cell state is not. Layers that no runtime computes on integer activations
    (GRU and RNN, embeddings, transposed convolutions) get integer weights alone, and are listed.

    `range`: how much of what passed a grid covers: the moving average of what each batch needs, all, what lowers the squared error
    of the values, all but one in 10,000 on either side, or what keeps the distribution (Kullback-Leibler divergence). The squared
    error is no good guide for whole networks: it clips the large values that decide outputs. `rounding`: of the weights,
    as in `quantize_weights`; `compensated` makes good for rounded inputs too. `tolerance`: where outputs on calibration data
    differ by more (divergence in nats for classes, a share of the variance for values), layers that hurt fall back to 8-bit
    weights and float inputs, and are listed; 0 for no limit.

    Paper: Jacob et al., CVPR 2018; ranges by squared error: Nagel et al., "A White Paper on Neural Network Quantization", 2021.
    Use when: speed on a CPU with integer instructions, and a file of a quarter.
    Costs: `batches` forward passes on calibration data; `compensated` two more of each.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    range: str = setting("average", choices=METHODS)
    batches: int = setting(8, low=1, high=100_000)
    weight_bits: int = setting(8, low=2, high=8)
    rounding: str = setting("nearest", choices=("nearest", "compensated"))
    tolerance: float = setting(0.02, low=0.0, high=100.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, with its grids, and before them one for each attention and recurrent layer."""
        yield from layer_swaps(model, context)
        known = recurrent_moments(model, context, self.batches) if self.rounding == "compensated" else {}
        yield from recurrent_swaps(model, context)
        layers = quantizable(model, context, self.weight_bits, per_channel=True)
        inside = inside_recurrent(model)
        computing = [path for path, layer in layers if isinstance(layer, COMPUTING) and not path.startswith(inside)]
        inner = _need_output_grid(model, context, set(computing))
        integer = _integer_recurrent(model, context, {path for path, _ in layers})
        entered, left, outputs = observe(model, context, [*computing, *integer], self.batches, inner, _GUARDED)
        damage = Damage(model, context, len(outputs), outputs) if self.tolerance else None
        grids: dict[str, dict[str, Tensor]] = {}
        for path, _ in layers:
            if path in entered:
                grids[path] = self._grids(entered[path], "input")
            elif path in computing:
                context.leave(path, "calibration data never reached it")
            elif not path.startswith(inside):
                context.leave(path, _WEIGHTS_ALONE)
            if path in entered and path in inner:
                grids[path] |= self._grids(left[path], "output")
        for path in filter(context.in_scope, (one.removesuffix(".") for one in inside)):
            if path in entered and path in integer:
                grids |= dict.fromkeys(integer[path], self._grids(entered[path], "input"))
            else:
                context.leave(path, _WEIGHTS_ALONE)
        layers = [(path, layer) for path, layer in layers if path in grids or path not in computing]
        if self.rounding == "compensated":
            widths = {path: self.weight_bits for path, _ in layers}
            yield from sequential_swaps(model, context, layers, widths, True, self.batches, grids=grids, known=known)
        else:
            means = {path: observed.mean for path, observed in entered.items()}
            yield tuple(
                quantized_swap(path, layer, self.weight_bits, True, grids.get(path), mean=means.get(path))
                for path, layer in layers
            )
        if damage is not None:
            yield from guarded(model, damage, context, dict(layers), self.tolerance)

    def mildest(self) -> Technique:
        """Return the default, 8 bits."""
        return QuantizeStatic()

    def _grids(self, observed: Observed, side: str) -> dict[str, Tensor]:
        """The grid of what entered a layer, or of what left one, under the names of the kind's buffers."""
        grid = unsigned_grid(observed, self.range)
        return dict(zip((f"{side}_scale", f"{side}_zero"), centred(grid) if side == "input" else grid, strict=True))


def _integer_recurrent(model: nn.Module, context: Context, quantized: set[str]) -> dict[str, list[str]]:
    """The layers that read what enters each LSTM in scope, by the LSTM's path: a runtime has integer kernels for it alone."""
    found = {}
    for path, layer in context.targets(model, SplitLSTM):
        names = [f"{path}.incoming.{place}".lstrip(".") for place in range(2 if layer.bidirectional else 1)]
        found.update({path: names} if quantized.issuperset(names) else {})
    return found


def _need_output_grid(model: nn.Module, context: Context, quantized: set[str]) -> set[str]:
    """Paths of convolutions whose output feeds something that is neither another quantized layer nor the model's output."""
    try:
        graph = trace(model, *as_call(example_inputs(context.data, context.device))).graph
    except ModelError:
        return set()
    first = first_paths(model)
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.target in _CONVOLUTIONS and first[module_path(node)] in quantized:
            ends = [_end(user) for user in node.users]
            if not all(_rounds(end, first, quantized) or end.op == "output" for end in ends):
                wanted.add(first[module_path(node)])
    return wanted


def _rounds(node: Node, first: Mapping[str, str], quantized: set[str]) -> bool:
    """Whether a node is a quantized layer, or takes a maximum that such a layer rounds and nothing reads but it and sums.

    The grid behind a maximum is as good before it, and exporters put it there.
    """
    if node.target in _COMPUTE:
        return first[module_path(node)] in quantized
    if node.target is not aten.max_pool2d.default:
        return False
    layers = [end for end in map(_end, node.users) if end.target is not aten.add.Tensor]
    return bool(layers) and all(end.target in _COMPUTE and first[module_path(end)] in quantized for end in layers)


def _end(node: Node) -> Node:
    """The first node on the way of a value that is not a ReLU, a clip or a padding with a single user."""
    while (node.target in _TRANSPARENT or _pads_with_zeros(node)) and len(node.users) == 1:
        node = next(iter(node.users))
    return node


def _pads_with_zeros(node: Node) -> bool:
    """Whether a node adds zeros around images, which the convolution behind it takes over when it is exported."""
    if node.target is not aten.pad.default or node.args[2:] not in _ZEROS:
        return False
    amounts: Any = node.args[1]  # negative ones cut
    return min(amounts) >= 0 and all(user.target in _CONVOLUTIONS for user in node.users)
