"""Shape an ONNX graph of QuantizeLinear and DequantizeLinear so that runtimes find their integer kernels in it.

A runtime computes integers where it recognises a pattern: codes that are multiplied as soon as they are decoded, sums whose
operands are both decoded. Only standard operators are written, so that every runtime reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

JOINS = frozenset({"Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""Operators that runtimes compute with integers if all they read is decoded."""
_LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
"""Operators of layers; their second input is the weight."""
MOVES = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
"""Operators that change the shape of a value and none of its numbers."""
_COARSE = 256  # parts of the largest bias that rounding may move another by one of
DECODE, ENCODE = "DequantizeLinear", "QuantizeLinear"
Array = np.ndarray[Any, Any]


def shaped(model: onnx.ModelProto, sources: Mapping[str, str]) -> onnx.ModelProto:
    """Return the model with its integer patterns laid open, and each node of a layer named by the layer's path.

    Args:
        model: whole, weights included.
        sources: state-dict name of each initializer that is a weight.
    """
    whole = ir.from_proto(model)
    graph = whole.graph
    if any(node.op_type == DECODE for node in graph):
        for step in (_turn_codes, _fold_padding, _join_grids, _share_grids, _round_before_pooling, _round_biases):
            for node in list(graph):
                step(graph, node)
        graph.sort()
        passes.RemoveUnusedNodesPass()(whole)
    _name_layers(graph, sources)
    return ir.to_proto(whole)


def layers(model: onnx.ModelProto) -> dict[str, bool]:
    """Return the paths of a model's layers, and whether they ask for integers: weight and input both come decoded.

    An LSTM asks for them where its weights are made of codes and its input is on a grid, or is what such an LSTM gives.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    codes = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    found: dict[str, bool] = {}
    for node in model.graph.node:
        if node.name and node.op_type == "LSTM":
            found[node.name] = _enters_on_grid(node, makers, found) and _is_made_of(codes, node.input[1], makers)
        elif node.name and node.op_type in _LAYERS:
            found[node.name] = all(name in makers and makers[name].op_type == DECODE for name in node.input[:2])
    return found


def _enters_on_grid(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], asked: Mapping[str, bool]) -> bool:
    """Whether what enters a layer comes decoded, or from a layer that asks for integers, moved at most."""
    maker = makers.get(node.input[0])
    while maker is not None and maker.op_type in MOVES:
        maker = makers.get(maker.input[0])
    return maker is not None and (maker.op_type == DECODE or (maker.op_type == "LSTM" and asked.get(maker.name, False)))


def _is_made_of(stored: set[str], name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether some of these tensors are behind a value."""
    left, seen = [name], set[str]()
    while left:
        value = left.pop()
        if value in stored:
            return True
        if value in makers and value not in seen:
            seen.add(value)
            left += makers[value].input
    return False


def layer_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Return the value that leaves each layer, by path, in the order of the graph: with its bias, where a sum adds it."""
    fixed = {initializer.name for initializer in model.graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = {}
    for node in model.graph.node:
        if node.name and node.op_type in _LAYERS:
            after = users.get(node.output[0], [])
            biased = len(after) == 1 and after[0].op_type == "Add" and any(name in fixed for name in after[0].input)
            found[node.name] = after[0].output[0] if biased else node.output[0]
    return found


def _turn_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose codes instead of what is decoded from them, so that decoding and multiplying stand side by side."""
    decoding = decoded(node.inputs[0]) if node.op_type == "Transpose" else None
    codes = None if decoding is None else array_of(decoding.inputs[0])
    if decoding is None or codes is None:
        return
    order = list(node.attributes.get_ints("perm", list(range(codes.ndim))[::-1]))
    name = f"{_name(decoding.inputs[0])}.{''.join(map(str, order))}"
    turned = constant(graph, name, codes.transpose(order))
    axis = order.index(decoding.attributes.get_int("axis", 1))
    become(graph, node, ir.node(DECODE, [turned, *decoding.inputs[1:]], attributes={"axis": axis}))


def _fold_padding(graph: ir.Graph, node: ir.Node) -> None:
    """Let a convolution of integers add the zeros that were added before its input was rounded: zero is on every grid."""
    decoding = decoded(node.inputs[0]) if node.op_type == "Conv" else None
    rounding = decoding.inputs[0].producer() if decoding is not None and decoding.inputs[0] is not None else None
    source = rounding.inputs[0] if rounding is not None and rounding.op_type == ENCODE else None
    padding = source.producer() if source is not None else None
    if decoding is None or rounding is None or padding is None or padding.op_type != "Pad":
        return
    alone = all(len(list(made.outputs[0].uses())) == 1 for made in (padding, rounding, decoding))
    added = _zeros_around(padding)
    if not alone or added is None or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return
    own = node.attributes.get_ints("pads", [0] * len(added))
    node.attributes.add(ir.AttrInt64s("pads", [int(one + more) for one, more in zip(own, added, strict=True)]))
    rounding.replace_input_with(0, padding.inputs[0])
    graph.remove(padding, safe=True)


def _zeros_around(padding: ir.Node) -> list[int] | None:
    """How many zeros a node adds before and behind each dimension of images; None where it does anything else."""
    amounts, filled, axes = (*padding.inputs[1:], None, None)[:3]
    count, value = array_of(amounts), np.zeros(()) if filled is None else array_of(filled)
    constant_mode = padding.attributes.get_string("mode", "constant") == "constant"
    if count is None or value is None or value.any() or axes is not None or not constant_mode:
        return None
    before, behind = count.reshape(2, -1).tolist()
    return None if any(before[:2] + behind[:2]) or min(before + behind) < 0 else before[2:] + behind[2:]


def _join_grids(graph: ir.Graph, node: ir.Node) -> None:
    """Round a value once where two layers round it on equal grids."""
    value = node.inputs[0] if node.op_type == ENCODE else None
    if value is None:
        return
    first = next(user for user, _ in value.uses() if user.op_type == ENCODE)
    if first is not node and _grid(first) == _grid(node):
        ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
        graph.remove(node, safe=True)


def _share_grids(graph: ir.Graph, node: ir.Node) -> None:
    """Let sums and pools read the rounded form of a value that is rounded for a layer anyway.

    So a residual sum has decoded operands on both sides, and no float copy of the value is kept.
    """
    value = node.inputs[0] if node.op_type == ENCODE else None
    if value is None or sum(user.op_type == ENCODE for user, _ in value.uses()) != 1:
        return
    decodings = [user for user, _ in node.outputs[0].uses() if user.op_type == DECODE]
    for user, place in list(value.uses()):
        if decodings and user.op_type in JOINS:
            user.replace_input_with(place, decodings[0].outputs[0])


def _round_before_pooling(graph: ir.Graph, node: ir.Node) -> None:
    """Round what a maximum is taken of as its result is rounded: the maximum is the same, and is then one of integers."""
    value = node.inputs[0] if node.op_type == ENCODE else None
    pool = value.producer() if value is not None else None
    if value is None or pool is None or pool.op_type != "MaxPool" or decoded(pool.inputs[0]) is not None:
        return
    if len(pool.outputs) == 1 and not value.is_graph_output() and all(user is node for user, _ in value.uses()):
        rounding = ir.node(ENCODE, [pool.inputs[0], *node.inputs[1:]])
        decoding = ir.node(DECODE, [rounding.outputs[0], *node.inputs[1:]])
        graph.insert_before(pool, [rounding, decoding])
        pool.replace_input_with(0, decoding.outputs[0])


def _round_biases(graph: ir.Graph, node: ir.Node) -> None:
    """Round the bias of a Gemm to the steps of its products, 32 bits wide, and write zeros out: integer kernels want both.

    Where the steps are coarse, as with inputs below 8 bits, the bias stays float: rounding it would move other codes.
    """
    if node.op_type != "Gemm" or len(node.inputs) < 3:
        return
    entering, weight, bias = (decoded(node.inputs[0]), decoded(node.inputs[1]), array_of(node.inputs[2]))
    if entering is None or weight is None or bias is None:
        return
    codes, scale, step = array_of(weight.inputs[0]), array_of(weight.inputs[1]), array_of(entering.inputs[1])
    if codes is None or scale is None or step is None:
        return
    product = np.atleast_1d(step.astype(np.float64) * scale).astype(np.float32)
    whole = np.round(bias / product.astype(np.float64))
    moved = np.abs(whole * product - bias).max(initial=0)
    if np.abs(whole).max(initial=0) >= 2**31 or moved > np.abs(bias).max(initial=0) / _COARSE:
        return
    axis = weight.attributes.get_int("axis", 1)
    for place, array, steps, along in ((1, codes, scale, axis), (2, whole.astype(np.int32), product, 0)):
        name = _name(node.inputs[place])
        parts = {"whole": array, "step": steps, "zero": np.zeros(steps.shape, array.dtype)}
        inputs = [constant(graph, f"{name}.{part}", value) for part, value in parts.items()]
        decoding = ir.node(DECODE, inputs, attributes={"axis": along})
        graph.insert_before(node, decoding)
        node.replace_input_with(place, decoding.outputs[0])


def _name_layers(graph: ir.Graph, sources: Mapping[str, str]) -> None:
    """Name the node of each layer by the path of the module whose tensors it reads."""
    origins: dict[ir.Value, list[list[str]]] = {}
    for name, value in graph.initializers.items():
        source = sources.get(name.partition(".")[0])
        origins[value] = [] if source is None else [source.split(".")[:-1]]
    taken: dict[str, int] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if all(value in origins for value in inputs):
            origin = [path for value in inputs for path in origins[value]]
            origins.update(dict.fromkeys(node.outputs, origin))
        elif node.op_type in _LAYERS:
            read = [path for value in inputs[1:] for path in origins.get(value, ())]
            if read:
                path = _shared(read)
                taken[path] = taken.get(path, 0) + 1
                node.name = path if taken[path] == 1 else f"{path}#{taken[path]}"


def _shared(paths: list[list[str]]) -> str:
    """The longest path that all begin with; a model that is one layer is called `model`."""
    first, *rest = paths
    for other in rest:
        while other[: len(first)] != first:
            first = first[:-1]
    return ".".join(first) or "model"


def become(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    """Put a node in another's place, one output each, the new one without a name yet.

    Args:
        graph: that holds `node`.
        node: whose output is none of the graph's.
        made: in no graph so far.
    """
    graph.insert_before(node, made)
    old, new = node.outputs[0], made.outputs[0]
    new.name, new.shape, new.type = f"{old.name}_", old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)


def decoded(value: ir.Value | None) -> ir.Node | None:
    """Return the node that decodes a value, if it comes from codes."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == DECODE else None


def array_of(value: ir.Value | None) -> Array | None:
    """Return the numbers of a value that is stored or constant; None for any other."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def _grid(node: ir.Node) -> list[bytes | None]:
    arrays = [array_of(value) for value in node.inputs[1:]]
    return [None if array is None else array.tobytes() for array in arrays]


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Return the initializer of that name, made from the array if the graph has none yet."""
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        graph.register_initializer(value)
    return graph.initializers[name]


__all__ = [
    "DECODE",
    "ENCODE",
    "JOINS",
    "array_of",
    "become",
    "constant",
    "decoded",
    "layer_outputs",
    "layers",
    "shaped",
]
