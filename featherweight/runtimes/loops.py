"""Loops of an ONNX graph whose bodies hold their own weights, for runtimes that do not let a body read what is outside it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxscript.optimizer

_ANY_SIZE = 2**62


def closed(model: bytes) -> bytes:
    """Return the model with what the bodies of its loops read from outside, and is made of stored tensors alone, stored in them.

    Args:
        model: serialized ONNX, weights included; without loops it is returned as it is.
    """
    whole = ir.from_proto(onnx.load_model_from_string(model))
    bodies = [node.attributes["body"].as_graph() for node in whole.graph if node.op_type == "Scan"]
    if not bodies:
        return model
    onnxscript.optimizer.fold_constants(whole, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    for body in bodies:
        for node in body:
            for place, value in enumerate(node.inputs):
                if value is not None and value.const_value is not None and value.graph is not body:
                    node.replace_input_with(place, _stored(body, value))
    return bytes(ir.to_proto(whole).SerializeToString())


def _stored(body: ir.Graph, value: ir.Value) -> ir.Value:
    """The initializer of a body that has the values of one outside."""
    name = f"{value.name}.inside"
    if name not in body.initializers:
        body.register_initializer(ir.Value(name=name, const_value=value.const_value))
    return body.initializers[name]


__all__ = ["closed"]
