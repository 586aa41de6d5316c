"""The operators of a model's layers as small graphs of their own, at any width: what a runtime's clock is held to.

An operator keeps what its node in the model says: strides, pads, direction, and whether weights and inputs are codes. Runtimes
choose kernels by type and shape, so weights are noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from featherweight.data import Inputs
from featherweight.integer_graph import layers
from featherweight.runtimes.onnxruntime import Session
from featherweight.runtimes.protocol import by_name

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_TIMED = ("Conv", "Gemm", "MatMul", *_GATES)
_OPSET, _IR = 18, 10
_STEP = 0.05  # of all grids
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Operator:
    """One layer's operator in a model.

    Attributes:
        node: of the model's graph.
        entering: shape of its input for one sample.
        integers: whether weight and input are codes.
        rounded: whether the output becomes codes too, after a ReLU or not.
    """

    node: onnx.NodeProto
    entering: tuple[int, ...]
    integers: bool
    rounded: bool

    def graph(self, shape: Sequence[int]) -> tuple[bytes, Array]:
        """Return the operator alone with another weight, as serialized ONNX, and an input for it.

        Args:
            shape: of the weight as PyTorch has it, `[out, in, ...]`; a recurrent layer's `[gates * hidden, in]`.
        """
        if self.node.op_type in _GATES:
            return self._recurrent(*shape)
        entering, attributes = list(self.entering), {one.name: one for one in self.node.attribute}
        if self.node.op_type == "Conv":
            groups = attributes["group"].i if "group" in attributes else 1
            if groups > 1 and shape[1] == 1:
                groups = shape[0]  # depthwise: a group goes with each channel
            entering[1] = shape[1] * groups
            shape = (max(1, shape[0] // groups) * groups, *shape[1:])
            if groups > 1:
                attributes["group"] = helper.make_attribute("group", groups)
            return self._matrix(shape, 0, entering, list(attributes.values()))
        entering[-1] = shape[1]
        if "transB" in attributes and attributes["transB"].i:
            return self._matrix(shape, 0, entering, list(attributes.values()))
        return self._matrix(shape[::-1], 1, entering, list(attributes.values()))

    def _matrix(
        self, shape: Sequence[int], axis: int, entering: list[int], attributes: list[onnx.AttributeProto]
    ) -> tuple[bytes, Array]:
        """A convolution or a product of matrices; `axis` of the weight is that of the outputs."""
        draw, made, out = np.random.default_rng(0), _Graph(), shape[axis]
        if self.integers:
            codes = draw.integers(-127, 128, shape).astype(np.int8)
            read = [made.decoded("x", np.zeros((), np.uint8)), made.decoded_weight("w", codes, out, axis)]
            given = draw.integers(0, 256, entering).astype(np.uint8)
        else:
            read, given = ["x", made.constant("w", _small(draw, shape))], _small(draw, entering)
        if self.integers and self.node.op_type == "Gemm":
            read.append(made.decoded_weight("b", np.zeros(out, np.int32), out, 0))
        elif self.node.op_type != "MatMul":  # which has its bias in an addition of its own
            read.append(made.constant("b", np.zeros(out, np.float32)))
        last = made.node(self.node.op_type, read, attributes)
        if self.rounded:
            last = made.encoded(last)
        return made.serialized(given, last), given

    def _recurrent(self, gates: int, inside: int) -> tuple[bytes, Array]:
        """A recurrent layer, all directions of it."""
        draw, made, many = np.random.default_rng(0), _Graph(), _GATES[self.node.op_type]
        attributes = {one.name: one for one in self.node.attribute}
        ways = 2 if "direction" in attributes and attributes["direction"].s == b"bidirectional" else 1
        hidden = max(1, gates // many)
        attributes["hidden_size"] = helper.make_attribute("hidden_size", hidden)
        shapes = {
            "w": (ways, many * hidden, inside),
            "r": (ways, many * hidden, hidden),
            "b": (ways, 2 * many * hidden),
        }
        read = [made.constant(name, _small(draw, shape)) for name, shape in shapes.items()]
        given = _small(draw, (*self.entering[:-1], inside))
        return made.serialized(given, made.node(self.node.op_type, ["x", *read], list(attributes.values()))), given


def operators_of(whole: bytes, inputs: Inputs) -> dict[str, Operator]:
    """Return the operators of a model's layers that can be timed alone, by the node's name, which is the layer's path.

    Args:
        whole: serialized ONNX, weights included.
        inputs: one sample, to see the shapes with.
    """
    model = onnx.load_model_from_string(whole)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    integers = layers(model)
    found = {node.name: node for node in model.graph.node if node.name and node.op_type in _TIMED}
    seen = _shapes(model, [node.input[0] for node in found.values()], inputs)
    return {
        path: Operator(node, seen[node.input[0]], integers[path], integers[path] and _rounded(node, users))
        for path, node in found.items()
    }


def _rounded(node: onnx.NodeProto, users: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Whether every reader of an output rounds it, a bias or a ReLU between them or not."""
    after = users.get(node.output[0], [])
    while len(after) == 1 and after[0].op_type in ("Relu", "Add"):
        after = users.get(after[0].output[0], [])
    return bool(after) and all(one.op_type == "QuantizeLinear" for one in after)


def _shapes(model: onnx.ModelProto, names: list[str], inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The shapes of some values inside a model."""
    known = {value.name for value in [*model.graph.output, *model.graph.input]}
    asked = sorted(set(names) - known)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in asked)
    session = Session(model.SerializeToString(), optimized=False)
    values = dict(zip(session.outputs, session.run(inputs), strict=True))
    given = by_name(session.inputs, inputs)
    return {name: np.shape(values[name] if name in values else given[name]) for name in names}


class _Graph:
    """Nodes and constants of one small graph with an input `x`."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, read: list[str], attributes: Sequence[onnx.AttributeProto] = ()) -> str:
        name = f"{kind}{len(self.nodes)}"
        made = helper.make_node(kind, read, [name], name=name)
        made.attribute.extend(attributes)
        self.nodes.append(made)
        return name

    def decoded(self, name: str, zero: Array) -> str:
        grid = [self.constant(f"{name}.step", np.array(_STEP, np.float32)), self.constant(f"{name}.zero", zero)]
        return self.node("DequantizeLinear", [name, *grid])

    def decoded_weight(self, name: str, codes: Array, out: int, axis: int) -> str:
        steps = self.constant(f"{name}.step", np.full(out, _STEP * _STEP, np.float32))
        zeros = self.constant(f"{name}.zero", np.zeros(out, codes.dtype))
        along = helper.make_attribute("axis", axis)
        return self.node("DequantizeLinear", [self.constant(name, codes), steps, zeros], [along])

    def encoded(self, name: str) -> str:
        grid = [self.constant("y.step", np.array(1.0, np.float32)), self.constant("y.zero", np.zeros((), np.uint8))]
        return self.node("QuantizeLinear", [self.node("Relu", [name]), *grid])

    def serialized(self, given: Array, last: str) -> bytes:
        kind = helper.np_dtype_to_tensor_dtype(given.dtype)
        outputs = [helper.make_empty_tensor_value_info(last)]
        inputs = [helper.make_tensor_value_info("x", kind, given.shape)]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        return bytes(model.SerializeToString())


def _small(draw: np.random.Generator, shape: Sequence[int]) -> Array:
    return (0.1 * draw.standard_normal(shape)).astype(np.float32)


__all__ = ["Operator", "operators_of"]
