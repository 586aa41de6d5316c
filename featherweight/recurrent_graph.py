"""Recurrent layers in a graph: over any number of steps, and as one operator a layer for plain ones too.

PyTorch's tracer walks through the steps of a recurrent layer, and so holds their number fixed; and its ONNX exporter writes out every
step of `nn.RNN`. `AnySteps` has a recurrent layer pass as one operator of which the shapes are known, and ONNX has one for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor
from torch.overrides import TorchFunctionMode

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@torch.library.custom_op("featherweight::recurrent", mutates_args=())
def recurrent(
    kind: str,
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """Compute a recurrent layer without projections in evaluation mode; arguments are those of `torch.lstm` and the like.

    Returns:
        The output and the final states, one of them or two.
    """
    states = list(hx) if kind == "lstm" else hx[0]
    function = getattr(torch._VF, kind)
    return list(function(input, states, params, has_biases, num_layers, 0.0, False, bidirectional, batch_first))


@recurrent.register_fake
def _(
    kind: str,
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    units = hx[0].shape[-1] * (2 if bidirectional else 1)
    return [input.new_empty(*input.shape[:2], units), *(torch.empty_like(state) for state in hx)]


class AnySteps(TorchFunctionMode):
    """While it is entered, recurrent layers are operators over any number of steps."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the place of PyTorch's own, but for layers with projections and packed sequences."""
        name = getattr(function, "__name__", "")
        if name in _KINDS and function == getattr(torch._C._VariableFunctions, name) and isinstance(args[2], list):
            input, states, parameters, biases, layers, _, _, both, first = args
            if len(parameters) == layers * (2 if both else 1) * (4 if biases else 2):
                given = list(states) if name == "lstm" else [states]
                return tuple(recurrent(name, input, given, parameters, biases, layers, both, first))
        return function(*args, **(kwargs or {}))


def _translated(
    kind: str,
    input: Any,
    hx: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Write what `recurrent` is."""
    from onnxscript.function_libs.torch_lib.ops import core  # slow to load, and only for export

    write = {"lstm": core.aten_lstm, "gru": core.aten_gru, "rnn_tanh": _plain("Tanh"), "rnn_relu": _plain("Relu")}[kind]
    states = hx if kind == "lstm" else hx[0]
    return write(input, states, params, has_biases, num_layers, 0.0, False, bidirectional, batch_first)


def _plain(function: str) -> Callable[..., Any]:
    """Return what writes `aten.rnn_tanh` or `aten.rnn_relu`, named by ONNX's activation function."""

    def rnn(
        input: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        ways, each = 2 if bidirectional else 1, 4 if has_biases else 2
        values = opset18.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        directions = [params[place : place + each] for place in range(0, len(params), each)]
        finals = []
        for layer in range(num_layers):
            own = directions[layer * ways : (layer + 1) * ways]
            both = [opset18.Concat(*parts[2:], axis=0) for parts in own] if has_biases else []
            values, final = opset18.RNN(
                values,
                _stacked([parts[0] for parts in own]),
                _stacked([parts[1] for parts in own]),
                _stacked(both) if both else None,
                None,
                opset18.Slice(hx, [layer * ways], [(layer + 1) * ways], [0]),
                activations=[function] * ways,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=params[1].shape[1],
            )
            # `[time, directions, batch, units]`, of which units stand behind each other
            values = opset18.Reshape(opset18.Transpose(values, perm=[0, 2, 1, 3]), [0, 0, -1])
            finals.append(final)
        values = opset18.Transpose(values, perm=[1, 0, 2]) if batch_first else values
        return values, opset18.Concat(*finals, axis=0) if len(finals) > 1 else finals[0]

    return rnn


def _stacked(parts: Sequence[Any]) -> Any:
    """Values of each direction, one above the other along a new first dimension."""
    rows = [opset18.Unsqueeze(part, [0]) for part in parts]
    return opset18.Concat(*rows, axis=0) if len(rows) > 1 else rows[0]


TRANSLATIONS = {
    torch.ops.aten.rnn_tanh.input: _plain("Tanh"),
    torch.ops.aten.rnn_relu.input: _plain("Relu"),
    torch.ops.featherweight.recurrent.default: _translated,
}
