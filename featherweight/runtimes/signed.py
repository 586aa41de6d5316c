"""Codes around 128 as signed ones around 0: the same grid, for runtimes whose signed codes need no zero point."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from featherweight.integer_graph import DECODE, ENCODE

_MIDDLE = 128
_OWN_WAYS = frozenset({"LSTM", "Scan", "Loop", "If"})  # what other passes look for unsigned codes around, or inside


def signed(model: bytes) -> bytes:
    """Return the model with each grid of unsigned codes whose zero is 128 written as one of signed codes whose zero is 0.

    Args:
        model: serialized ONNX, weights included; where such a zero is used in any other way it is returned as it is.
    """
    proto = onnx.load_model_from_string(model)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    zeros = {name: tensor for name, tensor in stored.items() if _in_the_middle(tensor)}
    for node in proto.graph.node:
        usual = node.op_type in (ENCODE, DECODE) and node.input[0] not in stored
        read = [name for place, name in enumerate(node.input) if place != 2 or not usual]
        if node.op_type in _OWN_WAYS or zeros.keys() & read:
            return model
    for name, tensor in zeros.items():
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array.astype("int16") - _MIDDLE).astype("int8"), name))
    return bytes(proto.SerializeToString()) if zeros else model


def _in_the_middle(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != onnx.TensorProto.UINT8:
        return False
    values = numpy_helper.to_array(tensor)
    return values.size == 1 and int(values.reshape(-1)[0]) == _MIDDLE


__all__ = ["signed"]
