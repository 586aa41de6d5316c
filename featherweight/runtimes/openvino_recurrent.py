"""LSTMs of an OpenVINO model computed with integers: those whose weights are stored as codes, and whose input is on a grid.

OpenVINO's kernel has one grid for what enters and for the hidden state, and one step for each unit of both matrices: it knows steps by
gate too, but takes those of one gate for another's (2026.4). Gates and cell state stay float. Hidden states lie within -1 and 1, so they
need no calibration, and inputs are scaled to meet them on one grid: the scale is taken out of the matrix again. Where all have grids
of their own, as NNCF writes them, the kernel reads the wrong ones.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import onnx

_LAYERS = ("LSTM", "GRU", "RNN")
_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze"})
_FILLS = _MOVES | {"Broadcast", "Slice", "StridedSlice", "Split", "VariadicSplit", "Convert"}
_LEVELS = 256
_GATES = 4
_SCALES = 2.0 ** np.arange(0, 8.5, 0.5)  # largest input after scaling, in units of the largest hidden state
Array = np.ndarray[Any, Any]


class _Entering(NamedTuple):
    """What enters an LSTM.

    Attributes:
        port: the input of an operator that is to read the rounded value instead.
        value: before it is rounded.
        largest: magnitude on its grid.
    """

    port: Any
    value: Any
    largest: float


def named(model: Any, onnx_model: bytes) -> None:
    """Give the recurrent layers of a model, in place, the names that their nodes have in the ONNX graph it was read from."""
    proto = onnx.load_model_from_string(onnx_model)
    nodes = {value: node.name for node in proto.graph.node if node.op_type in _LAYERS for value in node.output if value}
    if not nodes:
        return
    for operator in model.get_ordered_ops():
        for output in operator.outputs():
            for value in output.get_names() & nodes.keys():
                maker = _behind(operator, _MOVES | {"Convert"})
                if maker.get_type_name().removesuffix("Sequence") in _LAYERS:
                    maker.set_friendly_name(nodes[value])


def with_integers(openvino: Any, model: Any, asked: Collection[str]) -> None:
    """Rewrite the LSTMs of a model, in place, that ask for integers and that OpenVINO can then compute so; others stay.

    Args:
        openvino: the package.
        model: read from an ONNX graph with QuantizeLinear and DequantizeLinear; its recurrent layers are named.
        asked: names of the layers that ask for integers, of `integer_graph.layers`.
    """
    layers = [node for node in model.get_ordered_ops() if _is_lstm(node) and node.get_friendly_name() in asked]
    folded = _folded(openvino, model) if layers else {}
    for layer in layers:
        entering = _entering(layer)
        weights = [folded[layer.get_friendly_name()].input_value(place).get_node() for place in (4, 5)]
        stored = all(weight.get_type_name() == "Constant" and weight.data.shape[0] == 1 for weight in weights)
        if entering is not None and stored and _plain(layer):
            _rewrite(openvino.opset13, layer, entering, *(weight.data for weight in weights))
    model.validate_nodes_and_infer_types()


def _rewrite(ops: Any, layer: Any, entering: _Entering, incoming: Array, hidden: Array) -> None:
    """Put what enters, the hidden state and both matrices on grids that the kernel has."""
    reach = _reach(incoming, hidden, entering.largest)
    factor = reach / entering.largest
    incoming = incoming / factor
    low, high = np.float32(-reach), np.float32(reach * (_LEVELS // 2 - 1) / (_LEVELS // 2))
    scaled = ops.multiply(entering.value, ops.constant(np.float32(factor)))
    entering.port.replace_source_output(ops.fake_quantize(scaled, low, high, low, high, _LEVELS).output(0))
    first = layer.input(1)
    some = ops.slice(layer.input_value(0), *(np.array(part, np.int64) for part in ([0, 0], [1, 1], [1, 1], [1, 2])))
    zeros = ops.broadcast(ops.multiply(some, ops.constant(np.float32(0))), ops.shape_of(first.get_source_output()))
    first.replace_source_output(ops.fake_quantize(zeros, low, high, low, high, _LEVELS).output(0))
    step = _steps(incoming, hidden).astype(np.float32)
    for place, weight in ((4, incoming), (5, hidden)):
        codes = ops.convert(ops.constant(np.round(weight / step).astype(np.int8)), "f32")
        layer.input(place).replace_source_output(ops.multiply(codes, ops.constant(step)).output(0))


def _reach(incoming: Array, hidden: Array, largest: float) -> float:
    """The largest input after scaling for which rounding changes the gates least, as far as the matrices tell.

    A larger one has coarser hidden states, a smaller one coarser hidden matrices.
    """
    tried = [float(scale) for scale in _SCALES if scale <= max(1.0, largest)]
    return min(tried, key=lambda reach: _noise(incoming * (largest / reach), hidden, reach))


def _noise(incoming: Array, hidden: Array, reach: float) -> float:
    """Twelve times the variance that rounding adds to the gates in all: inputs of a third of the reach, hidden states of a third."""
    step = 2 * reach / _LEVELS
    values = step**2 * (np.square(incoming).sum() + np.square(hidden).sum())
    squares = incoming.shape[-1] * (reach / 3) ** 2 + hidden.shape[-1] * 0.1
    return float(values + squares * np.square(_steps(incoming, hidden)).sum())


def _steps(incoming: Array, hidden: Array) -> Array:
    """The step of each gate and unit, for both matrices and all gates of a unit alike, `[1, gates * units, 1]`."""
    largest: Array = np.maximum(*(np.abs(weight).max(-1) for weight in (incoming, hidden)))
    units: Array = np.tile(largest.reshape(_GATES, -1).max(0), _GATES)[None, :, None]
    return units.clip(1e-12) / 127


def _entering(layer: Any) -> _Entering | None:
    """What enters an LSTM from a grid, or from another LSTM; None where it is anything else."""
    port = layer.input(0)
    while (node := port.get_source_output().get_node()).get_type_name() in _MOVES:
        users = [user.get_node().get_type_name() for user in node.output(0).get_target_inputs()]
        if len(users) - users.count("ShapeOf") > 1:
            return None
        port = node.input(0)
    value = port.get_source_output()
    if _is_lstm(node):
        return _Entering(port, value, 1.0) if value.get_index() == 0 else None
    offset, scale = 0.0, 1.0
    for kind in ("Multiply", "Subtract"):
        if node.get_type_name() == kind:
            constant = _behind(node.input_value(1).get_node(), {"Convert"})
            if constant.get_type_name() != "Constant" or constant.data.size != 1:
                return None
            offset, scale = (offset, float(constant.data)) if kind == "Multiply" else (float(constant.data), scale)
            node = _behind(node.input_value(0).get_node(), {"Convert"})
    if node.get_type_name() != "FakeQuantize":
        return None
    ends = [node.input_value(place).get_node() for place in (3, 4)]
    largest = max(abs((float(end.data) - offset) * scale) for end in ends)
    return _Entering(port, node.input_value(0), largest) if largest > 0 else None


def _is_lstm(node: Any) -> bool:
    return bool(node.get_type_name() == "LSTMSequence")


def _behind(node: Any, kinds: Collection[str]) -> Any:
    """The first operator, going backwards from one along first inputs, that is of none of some kinds."""
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


def _plain(layer: Any) -> bool:
    """Whether a layer reads its steps forwards or backwards from a hidden state of zeros, with the usual activations."""
    facts = layer.get_attributes()
    usual = list(facts["activations"]) == ["sigmoid", "tanh", "tanh"] and not facts["clip"]
    return usual and facts["direction"] != "bidirectional" and _is_zero(layer.input_value(1))


def _is_zero(value: Any) -> bool:
    node = _behind(value.get_node(), _FILLS)
    return node.get_type_name() == "Constant" and not node.data.any()


def _folded(openvino: Any, model: Any) -> dict[str, Any]:
    """The LSTMs of a copy of the model whose stored tensors are computed as far as they go, by name."""
    copy = model.clone()
    passes = import_module(f"{openvino.__name__}.passes")
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(copy)
    return {node.get_friendly_name(): node for node in copy.get_ops() if _is_lstm(node)}


__all__ = ["named", "with_integers"]
