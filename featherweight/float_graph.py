"""Layers of an integer graph taken back to floats: where a runtime's integer form of them is the slower one.

The weights stay codes in the file, and are multiplied by their scales once, at load.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from featherweight.integer_graph import DECODE, ENCODE, JOINS, MOVES, constant, decoded, layers

_TRANSPARENT = frozenset({"Relu", "Clip", *MOVES, *JOINS})
"""Operators that integers pass on their way to the next grid."""
_PASSED = _TRANSPARENT | {DECODE, ENCODE}
_RECURRENT = "LSTM"
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})


def floated(model: bytes, paths: Collection[str], grids: bool = True) -> bytes:
    """Return the model with some layers computed with floats, and without the grids that only they needed.

    Args:
        model: serialized ONNX with QuantizeLinear and DequantizeLinear; its layers' nodes are named by their paths.
        paths: of the layers that become float; those that are float already do not matter.
        grids: whether what convolutions compute with integers keeps its grid where only floats read it: runtimes that compute
            integers only between two grids want that, others round for nothing.
    """
    whole = ir.from_proto(onnx.load_model_from_string(model))
    graph = whole.graph
    for node in list(graph):
        if node.name in paths and node.op_type == _RECURRENT:
            _enter_float(node)
        for place, value in enumerate(node.inputs if node.name in paths else ()):
            decoding = decoded(value)
            if decoding is not None and _encoding(decoding) is None:
                node.replace_input_with(place, _multiplied(graph, node, decoding))
    while _drop_loose_grids(graph, grids):
        passes.RemoveUnusedNodesPass()(whole)
    passes.RemoveUnusedNodesPass()(whole)
    return bytes(ir.to_proto(whole).SerializeToString())


def alike(model: bytes, most: int = 8) -> list[list[str]]:
    """Return the integer layers of a model in groups that a runtime computes alike: same operator, same shape of weight.

    Args:
        model: serialized ONNX.
        most: groups; where there are more, layers of the same operator, kernel and depth are one group.
    """
    proto = onnx.load_model_from_string(model)
    asked = {path for path, integers in layers(proto).items() if integers}
    codes = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == DECODE}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    fine: dict[object, list[str]] = {}
    coarse: dict[object, list[str]] = {}
    for node in proto.graph.node:
        if node.name in asked:
            shape = shapes.get(codes.get(node.input[1], ""), ())
            fine.setdefault((node.op_type, shape), []).append(node.name)
            coarse.setdefault((node.op_type, shape[2:], shape[1:2] == (1,)), []).append(node.name)
    return list((fine if len(fine) <= most else coarse).values())


def _enter_float(node: ir.Node) -> None:
    """Let a recurrent layer read what entered it before that was rounded."""
    reader, value = node, node.inputs[0]
    while (maker := value.producer() if value is not None else None) is not None and maker.op_type in MOVES:
        reader, value = maker, maker.inputs[0]
    decoding = decoded(value)
    source = None if decoding is None else _encoding(decoding)
    if source is not None:
        reader.replace_input_with(0, source.inputs[0])


def _drop_loose_grids(graph: ir.Graph, grids: bool) -> bool:
    """Let what computes with floats read the value before its grid; whether anything changed."""
    changed = False
    for node in list(graph):
        source = _encoding(node) if node.op_type == DECODE else None
        if source is None or (grids and _made_by_integers(source.inputs[0], set())):
            continue
        for user, place in list(node.outputs[0].uses()):
            if not _integer(user):
                user.replace_input_with(place, source.inputs[0])
                changed = True
    return changed


def _made_by_integers(value: ir.Value | None, seen: set[ir.Node]) -> bool:
    """Whether a value comes from a convolution of integers, with nothing but grids and transparent operators between."""
    node = value.producer() if value is not None else None
    if node is None or node in seen:
        return False
    seen.add(node)
    if node.op_type in _CONVOLUTIONS:
        return _integer(node)
    return node.op_type in _PASSED and any(_made_by_integers(source, seen) for source in node.inputs)


def _integer(node: ir.Node) -> bool:
    """Whether a node that reads decoded values is computed with integers: a layer, or a join that ends on a grid."""
    codes = [decoded(value) is not None for value in node.inputs if value is not None]
    if node.op_type in JOINS:
        return all(codes) and _ends_on_grid(node)
    if node.op_type in _TRANSPARENT:
        return _ends_on_grid(node)
    if node.op_type == _RECURRENT:
        return codes[0]
    return len(codes) > 1 and all(codes[:2])


def _ends_on_grid(node: ir.Node) -> bool:
    """Whether what a node makes is rounded again or enters a recurrent layer, with nothing but transparent operators between."""
    users = [user for user, _ in node.outputs[0].uses()]
    return any(
        user.op_type in (ENCODE, _RECURRENT) or (user.op_type in _TRANSPARENT and _ends_on_grid(user)) for user in users
    )


def _multiplied(graph: ir.Graph, node: ir.Node, decoding: ir.Node) -> ir.Value:
    """Codes times their scales, as plain arithmetic that a runtime does once; zero points of weights are zeros."""
    codes, scale = decoding.inputs[0], decoding.inputs[1]
    if codes is None or codes.shape is None or scale is None or scale.const_value is None:
        raise TypeError(f"{node.name} has a weight without a shape or scale")
    steps = np.asarray(scale.const_value.numpy())
    if steps.size > 1:
        axis = decoding.attributes.get_int("axis", 1)
        steps = steps.reshape([-1 if dim == axis else 1 for dim in range(len(codes.shape))])
    cast = ir.node("Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)})
    product = ir.node("Mul", [cast.outputs[0], constant(graph, f"{codes.name}.steps{steps.ndim}", steps)])
    for place, made in enumerate((cast, product)):
        made.outputs[0].name = f"{node.name}.{codes.name}.float{place}"
        graph.insert_before(node, made)
    return product.outputs[0]


def _encoding(decoding: ir.Node) -> ir.Node | None:
    """What rounded the value that is decoded; None for stored codes."""
    value = decoding.inputs[0]
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == ENCODE else None


__all__ = ["alike", "floated"]
