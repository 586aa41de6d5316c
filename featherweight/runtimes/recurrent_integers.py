"""LSTMs of an ONNX graph computed with integers: ONNX Runtime's `DynamicQuantizeLSTM`, from the codes that the model holds.

What reaches the layer, and its hidden state at each step, is rounded to 8 bits as it comes; gates and cell state stay float.
ONNX Runtime has no such operator for GRU and RNN.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeLSTM
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import numpy_helper

from featherweight.errors import ExportError
from featherweight.runtimes.onnxruntime import Session

_DOMAIN = "com.microsoft"
_MOVES = frozenset({"Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that carry values from place to place; a matrix that is made with any other is no table of codes."""
Array = np.ndarray[Any, Any]


class Codes(NamedTuple):
    """A weight of an LSTM as ONNX Runtime's operator takes it.

    Attributes:
        values: int8, `[directions, inputs, 4 * hidden]`.
        steps: float32, `[directions, 4 * hidden]`.
    """

    values: Array
    steps: Array


def with_integers(model: bytes) -> bytes:
    """Return the model with integer LSTMs, where both their weights are codes with one scale for each gate and unit.

    Args:
        model: serialized ONNX, as `portable.assemble` gives it.

    Raises:
        ExportError: no LSTM of the model can be computed so.
    """
    proto = onnx.load_model_from_string(model)
    found = {}
    for node in proto.graph.node:
        if node.op_type == "LSTM" and not any(item.name == "layout" and item.i for item in node.attribute):
            codes = [_codes(proto, name) for name in node.input[1:3]]
            if codes[0] is not None and codes[1] is not None:
                found[node.name] = (node, codes[0], codes[1])
    if not found:
        raise ExportError("no LSTM here has weights of integer codes with one scale for each gate and unit")
    for node, entering, staying in found.values():
        _rewrite(proto.graph, node, entering, staying)
    proto.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    whole = ir.from_proto(proto)
    passes.RemoveUnusedNodesPass()(whole)
    return bytes(ir.to_proto(whole).SerializeToString())


def _rewrite(graph: onnx.GraphProto, node: onnx.NodeProto, entering: Codes, staying: Codes) -> None:
    """Make an LSTM the operator of integers; scales and zero points stand behind its own eight inputs."""
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    for place, (letter, codes) in enumerate((("W", entering), ("R", staying)), start=1):
        inputs[place] = f"{node.name}.{letter}"
        zeros = np.zeros(codes.steps.shape, np.int8)
        for part, array in (("", codes.values), (".step", codes.steps), (".zero", zeros)):
            graph.initializer.append(numpy_helper.from_array(array, inputs[place] + part))
    behind = [inputs[place] + part for place in (1, 2) for part in (".step", ".zero")]
    del node.input[:]
    node.input.extend([*inputs, *behind])
    node.op_type, node.domain = "DynamicQuantizeLSTM", _DOMAIN


def _codes(proto: onnx.ModelProto, name: str) -> Codes | None:
    """The codes behind a weight `[directions, 4 * hidden, inputs]`; None where it is made of anything else.

    The operators that turn codes into the weight are run three times: as they are, with ones for the codes, which gives the
    steps in place, and with ones for the steps, which gives the codes in place.
    """
    part = _behind(proto, name)
    if part is None:
        return None
    kinds = {tensor.name: tensor.data_type for tensor in part.graph.initializer}
    whole = _values(part, {})
    steps = _values(part, {key: 1 for key, kind in kinds.items() if kind == onnx.TensorProto.INT8})
    values = _values(part, {key: 1 for key, kind in kinds.items() if kind == onnx.TensorProto.FLOAT})
    each = steps[:, :, :1]
    if onnx.TensorProto.INT8 not in kinds.values() or (steps != each).any() or (values * each != whole).any():
        return None
    codes = values.astype(np.int8)
    if (codes != values).any():
        return None
    return Codes(np.ascontiguousarray(codes.transpose(0, 2, 1)), np.ascontiguousarray(each[:, :, 0]))


def _behind(proto: onnx.ModelProto, name: str) -> onnx.ModelProto | None:
    """The part of a graph that makes one value from stored ones; None where it reads inputs or computes more than codes times steps."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    wanted, nodes, leaves = [name], dict[str, onnx.NodeProto](), dict[str, onnx.TensorProto]()
    while wanted:
        value = wanted.pop()
        if not value or value in nodes or value in leaves:
            continue
        if value in stored:
            leaves[value] = stored[value]
        elif value in makers and makers[value].op_type in _MOVES | {"Cast", "Mul", "Constant"}:
            nodes |= dict.fromkeys(makers[value].output, makers[value])
            wanted += makers[value].input
        else:
            return None
    ordered = [node for node in proto.graph.node if node.output and node.output[0] in nodes]
    made = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(ordered, "weight", [], [made], list(leaves.values()))
    return onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _values(part: onnx.ModelProto, ones: dict[str, int]) -> Array:
    """What a part of a graph makes, with ones in the place of some stored tensors."""
    model = onnx.ModelProto()
    model.CopyFrom(part)
    for tensor in model.graph.initializer:
        if tensor.name in ones:
            tensor.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(tensor)), tensor.name))
    return np.asarray(Session(model.SerializeToString()).run(())[0])


__all__ = ["with_integers"]
