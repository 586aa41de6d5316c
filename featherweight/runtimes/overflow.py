"""Weights as unsigned bytes where the CPU's sums of signed ones overflow.

x86 without VNNI multiplies unsigned with signed bytes and adds two products in 16 bits: `2 * 255 * 127` is too large for them.
ONNX Runtime has a kernel for unsigned weights too, slower and exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from featherweight.cpu import sums_overflow
from featherweight.integer_graph import DECODE, ENCODE

_LSTM = "DynamicQuantizeLSTM"
_PLACES = {
    DECODE: ((0, 2, 1),),
    _LSTM: ((1, 9, 8), (2, 11, 10)),
}  # of codes, their zero and their scale among the inputs
_HARMLESS = 64  # largest code whose products add up in 16 bits
_MIDDLE = 128


def exact(model: bytes) -> bytes:
    """Return a model whose sums do not overflow on this CPU, in ONNX Runtime; most often the model itself.

    Args:
        model: serialized ONNX, weights included.
    """
    return unsigned(model) if sums_overflow() else model


def unsigned(model: bytes) -> bytes:
    """Return the model with large signed codes of weights written as unsigned ones around 128: the same weights.

    Args:
        model: serialized ONNX, weights included; where nothing rounds activations it is returned as it is.
    """
    proto = onnx.load_model_from_string(model)
    if not any(node.op_type in (ENCODE, _LSTM) for node in proto.graph.node):
        return model
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses = Counter(_reads(proto.graph))
    found: dict[str, list[tuple[onnx.NodeProto, int, int]]] = {}
    for node in proto.graph.node:
        for place, zero, scale in _PLACES.get(node.op_type, ()):
            if len(node.input) > scale and node.input[scale] in stored:
                found.setdefault(node.input[place], []).append((node, zero, scale))
    changed = False
    for name, readers in found.items():
        tensor = stored.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.INT8 or uses[name] > len(readers):
            continue
        codes = numpy_helper.to_array(tensor)
        if codes.size and max(int(codes.max()), -int(codes.min())) > _HARMLESS:
            tensor.CopyFrom(numpy_helper.from_array(_moved(codes), name))
            for number, (node, zero, scale) in enumerate(readers):
                _give_zero(proto.graph, node, zero, stored, stored[node.input[scale]], f"{name}/zero/{number}")
            changed = True
    return bytes(proto.SerializeToString()) if changed else model


def _give_zero(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    place: int,
    stored: dict[str, onnx.TensorProto],
    scale: onnx.TensorProto,
    name: str,
) -> None:
    """Let a node read the moved zero of its codes, which is 0 where it had none."""
    given = node.input[place] if len(node.input) > place else ""
    before = numpy_helper.to_array(stored[given]) if given else np.zeros(list(scale.dims), np.int8)
    graph.initializer.append(numpy_helper.from_array(_moved(before), name))
    node.input.extend([""] * (place + 1 - len(node.input)))
    node.input[place] = name


def _moved(codes: np.ndarray[tuple[int, ...], np.dtype[np.int8]]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (codes.astype(np.int16) + _MIDDLE).astype(np.uint8)


def _reads(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that the nodes of a graph read, and those of graphs inside, once a reading."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _reads(inner)
    yield from (value.name for value in graph.output)
