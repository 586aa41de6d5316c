"""An exported program with its grids written as numbers, as compilers of quantized PyTorch programs want them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from featherweight.layers.quantized import reference

_SHIFT = 128  # between a code of 0..255 and the same code of -128..127
_TRANSPARENT = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default, torch.ops.aten.hardtanh.default}
_JOINS = {torch.ops.aten.add.Tensor, torch.ops.aten.cat.default, torch.ops.aten.max_pool2d.default}


def baked(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    signed: bool,
    floats: bool = False,
    shapes: Any = None,
) -> ExportedProgram:
    """Return the program for inputs of these shapes, with every scale and zero of its grids a number.

    Args:
        program: of a model whose quantized layers compute with reference operators.
        args: example positional inputs.
        kwargs: example keyword inputs.
        floats: store weights as floats that are then rounded to their codes, as LiteRT's converter wants them.
        signed: write codes of activations as -128 to 127, the same grid moved, as XNNPACK and LiteRT take them.
        shapes: which dimensions of the inputs stay dynamic, as `torch.export.export` takes them; without it, none.
    """
    module = program.module()
    if not isinstance(module, GraphModule):
        raise TypeError(f"an exported program gave {type(module).__name__}, not a graph")
    for node in list[Any](module.graph.nodes):
        if node.target is reference.quantize_per_tensor.tensor:
            _write(module, node, reference.quantize_per_tensor.default, signed)
        elif node.target is reference.dequantize_per_tensor.tensor:
            _write(module, node, reference.dequantize_per_tensor.default, signed)
        elif node.target is reference.dequantize_per_channel.default:
            _scales(module, node, floats)
    _share_grids(module)
    if signed and not floats:
        _decode_loose(module)
    module.graph.eliminate_dead_code()
    _forget(module)
    module.recompile()
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def loosened(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Return the program for inputs of these shapes without grids for activations, every weight decoded to floats.

    Args:
        program: of a model whose quantized layers compute with reference operators, or of any other.
        args: example positional inputs.
        kwargs: example keyword inputs.
    """
    module = program.module()
    if not isinstance(module, GraphModule):
        raise TypeError(f"an exported program gave {type(module).__name__}, not a graph")
    for node in list[Any](module.graph.nodes):
        if node.target is reference.dequantize_per_tensor.tensor:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target is reference.dequantize_per_channel.default:
            _scales(module, node, floats=False)
            _decode(module, node)
    module.graph.eliminate_dead_code()
    _forget(module)
    module.recompile()
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, strict=False)


def _write(module: GraphModule, node: Any, operator: Any, signed: bool) -> None:
    """Put the operator that takes numbers in the place of the one that takes tensors."""
    value, scale, zero, low, high, kind = node.args[:6]
    numbers = (float(_tensor(module, scale)), int(_tensor(module, zero)), int(low), int(high))
    step, offset, least, most = numbers
    if signed:
        offset, least, most, kind = offset - _SHIFT, least - _SHIFT, most - _SHIFT, torch.int8
    with module.graph.inserting_before(node):
        made = module.graph.call_function(operator, (value, step, offset, least, most, kind))
    made.meta.update(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _scales(module: GraphModule, node: Any, floats: bool) -> None:
    """Write a scale and a zero for each channel of a weight out, where the layer leaves them to be understood."""
    source, count = node.args[1], int(node.args[0].meta["val"].shape[int(node.args[3])])
    if isinstance(source, Node) and source.op == "call_function":
        source = source.args[0]
    each = _tensor(module, source).expand(count).contiguous()
    owner, _, name = str(source.target).rpartition(".")
    layer = module.get_submodule(owner)  # whose path compilers then keep in the tensors' names
    layer.register_buffer(f"{name}_each", each)
    layer.register_buffer(f"{name}_zeros", torch.zeros(count, dtype=torch.int64))
    with module.graph.inserting_before(node):
        made = [module.graph.get_attr(f"{source.target}_{part}") for part in ("each", "zeros")]
    codes = node.args[0]
    if floats:
        axis = int(node.args[3])
        steps = each.reshape([-1 if dim == axis else 1 for dim in range(codes.meta["val"].dim())])
        layer.register_buffer(f"{name}_weight", _tensor(module, codes) * steps)
        with module.graph.inserting_before(node):
            weight = module.graph.get_attr(f"{source.target}_weight")
            codes = module.graph.call_function(reference.quantize_per_channel.default, (weight, *made, *node.args[3:]))
    node.args = (codes, *made, *node.args[3:])


def _share_grids(module: GraphModule) -> None:
    """Let sums read the rounded form of a value that is rounded for a layer anyway, so that they are integers too."""
    for node in list[Any](module.graph.nodes):
        if node.target is not reference.quantize_per_tensor.default:
            continue
        value = node.args[0]
        roundings = [user for user in value.users if user.target is node.target]
        if len({user.args[1:] for user in roundings}) != 1 or roundings[0] is not node:
            continue
        decodings = [user for user in node.users if user.target is reference.dequantize_per_tensor.default]
        if value.op == "call_function" and decodings:  # before whatever else reads the value
            value.append(node)
            node.append(decodings[0])
        for other in roundings[1:]:
            other.replace_all_uses_with(node)
        for user in list(value.users):
            if decodings and user.target in _JOINS:
                user.replace_input_with(value, decodings[0])
        _round_before_pooling(module, node)


def _round_before_pooling(module: GraphModule, rounding: Any) -> None:
    """Round what a maximum is taken of as its result is rounded: the maximum is the same, and is then one of integers."""
    pool = rounding.args[0]
    if pool.target is not torch.ops.aten.max_pool2d.default or len(pool.users) > 1:
        return
    value = pool.args[0]
    if value.target is reference.dequantize_per_tensor.default:
        return
    with module.graph.inserting_before(pool):
        codes = module.graph.call_function(rounding.target, (value, *rounding.args[1:]))
        decoded = module.graph.call_function(reference.dequantize_per_tensor.default, (codes, *rounding.args[1:]))
    pool.replace_input_with(value, decoded)


def _decode_loose(module: GraphModule) -> None:
    """Compute a layer whose output is on no grid with floats: XNNPACK has integer kernels between two grids only."""
    decode = (reference.dequantize_per_channel.default, reference.dequantize_per_tensor.default)
    for node in list[Any](module.graph.nodes):
        if node.target is not decode[0]:
            continue
        layer = next(iter(node.users))
        after = layer
        while len(after.users) == 1 and next(iter(after.users)).target in _TRANSPARENT:
            after = next(iter(after.users))
        if all(user.target is reference.quantize_per_tensor.default for user in after.users):
            continue
        _decode(module, node)
        entering = layer.args[0]
        if entering.target is decode[1] and not _weighed(entering.args[0].args[0]):  # the layer before needs its grid
            layer.replace_input_with(entering, entering.args[0].args[0])


def _weighed(node: Any) -> bool:
    """Whether a value leaves a layer with codes, activation included."""
    while node.target in _TRANSPARENT:
        node = node.args[0]
    return any(source.target is reference.dequantize_per_channel.default for source in node.all_input_nodes)


def _decode(module: GraphModule, node: Any) -> None:
    """Put the floats that codes stand for in the place of what decodes them."""
    codes, scale, axis = _tensor(module, node.args[0]), _tensor(module, node.args[1]), int(node.args[3])
    name = f"{str(node.args[0].target).replace('.', '_')}_weight"
    module.register_buffer(name, codes * scale.reshape([-1 if dim == axis else 1 for dim in range(codes.dim())]))
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.get_attr(name))


def _forget(module: GraphModule) -> None:
    """Drop the tensors that nothing reads any more; compilers would store them, or stumble over their types."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in [*module.named_buffers(), *module.named_parameters()] if name not in read]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)


def _tensor(module: GraphModule, node: Any) -> Tensor:
    """The value of a node that reads a parameter or buffer."""
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value.detach()
