"""Attention as PyTorch's exporter writes it, in the operators that runtimes know it by.

The exporter turns the keys by way of three dimensions, and scales queries and keys one by one, both by the root of the scale.
Runtimes fuse `softmax(scale * q @ k.T) @ v` where it is written so, and move and scale for themselves what stands before it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from featherweight.integer_graph import array_of, become

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


def with_heads(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Give attention without heads, over three dimensions, one head: the exporter takes four alone. In place.

    Args:
        program: as exported.
    """
    graph = program.graph_module.graph
    for node in list[Any](graph.nodes):
        if node.target is not _ATTENTION or node.args[0].meta["val"].dim() != 3:
            continue
        kind = node.meta["val"]
        with graph.inserting_before(node):
            node.args = tuple(_with_head(graph, part) for part in node.args)
            mask = node.kwargs.get("attn_mask")
            node.kwargs = {**node.kwargs, **({} if mask is None else {"attn_mask": _with_head(graph, mask)})}
        node.meta = {**node.meta, "val": aten.unsqueeze.default(kind, 1)}
        with graph.inserting_after(node):
            single = graph.call_function(aten.squeeze.dim, (node, 1))
            single.meta = {**node.meta, "val": kind}
        node.replace_all_uses_with(single, delete_user_cb=lambda user, single=single: user is not single)
    program.graph_module.recompile()
    return program


def _with_head(graph: torch.fx.Graph, part: Any) -> Any:
    """A value of three dimensions with one more; what has fewer, as masks may, spreads over it anyway."""
    if not isinstance(part, torch.fx.Node) or part.meta["val"].dim() != 3:
        return part
    made = graph.call_function(aten.unsqueeze.default, (part, 1))
    made.meta = {**part.meta, "val": aten.unsqueeze.default(part.meta["val"], 1)}
    return made


def simplified(model: ir.Model) -> None:
    """Turn keys by one Transpose, and scale what queries and keys give instead of both; in place.

    Args:
        model: as exported, shapes of values included, its constants folded.
    """
    for kind, step in (("Reshape", _turn_at_once), ("MatMul", _scale_after)):
        for node in list(model.graph):
            if node.op_type == kind and not node.outputs[0].is_graph_output():  # whose name is the user's
                step(model.graph, node)
    model.graph.sort()


def _turn_at_once(graph: ir.Graph, last: ir.Node) -> None:
    """Put one Transpose of the last two dimensions in the place of one between two Reshapes."""
    turning = _maker(last.inputs[0], "Transpose")
    first = _maker(turning.inputs[0], "Reshape") if turning is not None else None
    keys = first.inputs[0] if first is not None else None
    if turning is None or first is None or keys is None or keys.shape is None:
        return
    rank = len(keys.shape)
    rows, columns, before = (rank - 2,), (rank - 1,), tuple(range(rank - 2))
    if list(turning.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return
    if _sizes(first.inputs[1], keys) != [-1, rows, columns] or _sizes(last.inputs[1], keys) != [before, columns, rows]:
        return
    made = ir.node("Transpose", [keys], attributes={"perm": [*before, *columns, *rows]})
    become(graph, last, made)


def _sizes(wanted: ir.Value | None, of: ir.Value) -> list[int | tuple[int, ...]] | None:
    """What a shape is joined of: numbers, and the dimensions of a value whose sizes it takes; None where it is anything else."""
    joined = _maker(wanted, "Concat")
    parts: list[int | tuple[int, ...]] = []
    for part in joined.inputs if joined is not None else ():
        numbers, taken = array_of(part), _dimensions(part, of)
        if numbers is None and taken is None:
            return None
        parts += [taken] if taken is not None else numbers.reshape(-1).tolist() if numbers is not None else []
    return parts


def _dimensions(part: ir.Value | None, of: ir.Value) -> tuple[int, ...] | None:
    """The dimensions of a value whose sizes another value takes from its shape."""
    cut = _maker(part, "Slice")
    measured = _maker(cut.inputs[0], "Shape") if cut is not None else None
    if cut is None or measured is None or measured.inputs[0] is not of or measured.attributes.get_int("start", 0):
        return None
    ends = [array_of(value) for value in cut.inputs[1:]]
    if len(ends) != 2 or ends[0] is None or ends[1] is None or of.shape is None:
        return None
    return tuple(range(len(of.shape))[int(ends[0][0]) : int(ends[1][0])])


def _scale_after(graph: ir.Graph, product: ir.Node) -> None:
    """Multiply a product by one number instead of both of its factors by one each."""
    query, keys = (_maker(value, "Mul") for value in product.inputs)
    if query is None or keys is None or any(len(list(node.outputs[0].uses())) > 1 for node in (query, keys)):
        return
    cast = _maker(keys.inputs[1], "CastLike")
    scales = [array_of(value) for value in (query.inputs[1], cast.inputs[0] if cast is not None else keys.inputs[1])]
    if scales[0] is None or scales[1] is None or scales[0].size > 1 or scales[1].size > 1:
        return
    scale = (scales[0] * scales[1]).reshape(()).astype(scales[0].dtype)
    number = ir.node("Constant", [], attributes={"value": ir.tensor(scale)})
    inner = ir.node("MatMul", [query.inputs[0], keys.inputs[0]])
    graph.insert_before(product, [number, inner])
    become(graph, product, ir.node("Mul", [inner.outputs[0], number.outputs[0]]))


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None
