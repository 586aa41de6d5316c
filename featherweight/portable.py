"""A model as an ONNX graph without its weights: small, and runnable once the weights are put back.

The graph is exported with weights unfolded, so that every initializer is a state-dict tensor under its own name; names
and attributes that say nothing are dropped. Large constants that are in no state dict (tables, masks) are handed out
separately, to be stored with the weights.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from onnx import numpy_helper
from onnxscript import opset18
from torch import Tensor, nn
from torch._decomp.decompositions import lstm_impl

from featherweight import attention_graph, packed_graph, recurrent_graph
from featherweight.data import Data, as_call, example_inputs
from featherweight.errors import ArtifactError, ExportError
from featherweight.integer_graph import shaped
from featherweight.layers import looping
from featherweight.layers.quantized import reference
from featherweight.modes import evaluating
from featherweight.trace import line_of, traceable, unlogged

_LARGEST_CONSTANT = 64  # elements; anything larger in no state dict is stored with the weights
_WEIGHT, _CONSTANT = "w", "c"


@dataclass(frozen=True)
class Graph:
    """An ONNX graph without weights.

    Attributes:
        skeleton: the serialized model; weight initializers have a name (`w3`, `c0`) and nothing else.
        weights: the state-dict name of each `w` initializer, in order.
        constants: the tensors of the `c` initializers, in order.
    """

    skeleton: bytes
    weights: tuple[str, ...]
    constants: tuple[Tensor, ...]


def _quantize(values: Any, scale: Any, zero: Any, low: int, high: int, dtype: int) -> Any:
    return opset18.QuantizeLinear(values, scale, zero)


def _dequantize(codes: Any, scale: Any, zero: Any, low: int, high: int, dtype: int, out_dtype: int = -1) -> Any:
    return opset18.DequantizeLinear(codes, scale, zero)


_TRANSLATIONS = {
    reference.quantize_per_tensor.tensor: _quantize,
    reference.dequantize_per_tensor.tensor: _dequantize,
    torch.ops.featherweight.until.default: packed_graph.translated,
    **recurrent_graph.TRANSLATIONS,
}


def export_graph(model: nn.Module, data: Data) -> Graph:
    """Return the model's graph without weights; dimension 0 of every input and output stays dynamic.

    Args:
        model: in any mode; exported in evaluation mode from the CPU, and not changed.
        data: gives the example and the names of further dynamic dimensions.

    Raises:
        ExportError: the model cannot be traced or holds an operator that ONNX does not have.
    """
    try:
        with looping(model):
            program = export_program(model, data)
        exported = _exported(attention_graph.with_heads(_unrolled(program))).model
        packed_graph.with_lengths(exported)
    except ExportError:
        raise
    except Exception as error:  # whatever the exporter raises
        raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {_first_line(error)}") from error
    state = model.state_dict()
    onnxscript.optimizer.fold_constants(exported, should_fold=lambda node: False if _reads(node, state) else None)
    attention_graph.simplified(exported)
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        simplify(exported)
    return _strip(onnx_ir.to_proto(exported), set(state))


def assemble(graph: Graph, state: Mapping[str, Tensor]) -> bytes:
    """Return the serialized ONNX model with its weights put back.

    Raises:
        ArtifactError: the graph names a tensor that is not there.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(graph.skeleton)
    except Exception as error:
        raise ArtifactError(f"the stored graph cannot be read: {_first_line(error)}") from error
    for initializer in model.graph.initializer:
        if initializer.data_type:
            continue
        kind, number = initializer.name[:1], initializer.name[1:]
        table: Any = {_WEIGHT: graph.weights, _CONSTANT: graph.constants}.get(kind, ())
        if not number.isdigit() or int(number) >= len(table):
            raise ArtifactError(f"the stored graph asks for a tensor {initializer.name!r} that the file does not hold")
        value = table[int(number)]
        tensor = state[value] if kind == _WEIGHT else value
        initializer.CopyFrom(numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), initializer.name))
    sources = {f"{_WEIGHT}{place}": name for place, name in enumerate(graph.weights)}
    return bytes(shaped(model, sources).SerializeToString())


def export_program(model: nn.Module, data: Data) -> torch.export.ExportedProgram:
    """Return the model as PyTorch exports it, in evaluation mode; dimension 0 of every input is dynamic where that can be.

    Args:
        model: in any mode, on the CPU; not changed.
        data: gives the example and the names of further dynamic dimensions.

    Raises:
        ExportError: the model cannot be traced.
    """
    inputs = example_inputs(data)
    args, kwargs = as_call(inputs)
    named = dict(data.dynamic or {})
    parameters = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    spec = {name: _dynamic(value, named.get(name, {}), torch.export.Dim("batch")) for name, value in parameters.items()}
    attempts: list[Any] = [spec if kwargs else tuple(_flat(spec.values()))]
    loose = {name: _dynamic(value, named.get(name, {}), torch.export.Dim.AUTO) for name, value in parameters.items()}
    attempts.append(loose if kwargs else tuple(_flat(loose.values())))
    reasons = []
    for shapes in attempts:
        for strict in (False, True):  # the strict tracer alone keeps `len(x)` a size that may change
            try:
                with evaluating(model), traceable(strict, any_number=bool(named)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
            except Exception as error:  # whatever the tracer or the user's forward raises
                reasons.append(f"{_first_line(error)}{line_of(error)}")
    raise ExportError(f"{type(model).__name__} cannot be traced: {reasons[0]}")


def _flat(values: Any) -> list[Any]:
    """Positional shapes, with those of a `*args` parameter spread out."""
    flat: list[Any] = []
    for value in values:
        flat.extend(value) if isinstance(value, tuple) else flat.append(value)
    return flat


def _dynamic(value: Any, named: Mapping[int, str], batch: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: batch, **{dim: torch.export.Dim(name) for dim, name in named.items()}}
    if isinstance(value, Mapping):
        return {key: _dynamic(item, named, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_dynamic(item, named, batch) for item in value)
    return None


def _unrolled(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Write LSTMs with projections out step by step, because the exporter drops the projection: ONNX's LSTM has none."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            _, _, parameters, biases, layers, _, _, both, *_ = node.args
            if len(parameters) // (layers * (2 if both else 1)) in ((5,) if biases else (3,)):
                program = program.run_decompositions({torch.ops.aten.lstm.input: lstm_impl})
                break
    return program


def _exported(program: torch.export.ExportedProgram) -> Any:
    # the exporter warns of torchvision, which is not wanted here
    with unlogged("torch.onnx._internal.exporter._registration"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=_TRANSLATIONS,  # type: ignore[arg-type]
        )


def _reads(node: Any, state: Mapping[str, Tensor]) -> bool:
    return any(value is not None and value.name in state for value in node.inputs)


def _strip(model: onnx.ModelProto, state: set[str]) -> Graph:
    weights: list[str] = []
    constants: list[Tensor] = []
    names: dict[str, str] = {"": ""}
    graph = model.graph
    for value in [*graph.input, *graph.output]:
        names[value.name] = value.name
    bare = []
    for initializer in graph.initializer:
        if initializer.name in state:
            names[initializer.name] = f"{_WEIGHT}{len(weights)}"
            weights.append(initializer.name)
        elif np.prod(initializer.dims, initial=1) > _LARGEST_CONSTANT:
            names[initializer.name] = f"{_CONSTANT}{len(constants)}"
            constants.append(torch.from_numpy(numpy_helper.to_array(initializer).copy()))
        else:
            names[initializer.name] = _short(len(names))
            initializer.name = names[initializer.name]
            bare.append(initializer)
            continue
        bare.append(onnx.TensorProto(name=names[initializer.name]))
    del graph.initializer[:]
    graph.initializer.extend(bare)
    _rename(graph, names, {opset.domain: opset.version for opset in model.opset_import})
    slim = onnx.ModelProto(
        ir_version=model.ir_version, graph=graph, opset_import=model.opset_import, functions=model.functions
    )
    return Graph(bytes(slim.SerializeToString(deterministic=True)), tuple(weights), tuple(constants))


def _rename(graph: onnx.GraphProto, names: dict[str, str], opsets: Mapping[str, int]) -> None:
    """Give every inner value a short name, and drop what a reader can do without."""
    graph.name = "g"
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        value.name = names.setdefault(value.name, _short(len(names)))
    for node in graph.node:
        node.name = ""
        _drop_defaults(node, opsets)
        for table in (node.input, node.output):
            for place, name in enumerate(table):
                if name not in names:
                    names[name] = _short(len(names))
                table[place] = names[name]
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else ():
                _rename(inner, names, opsets)


def _drop_defaults(node: onnx.NodeProto, opsets: Mapping[str, int]) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return
    defaults = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    kept = [item for item in node.attribute if not _is_default(item, defaults.get(item.name))]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_default(attribute: onnx.AttributeProto, default: onnx.AttributeProto | None) -> bool:
    if (
        default is not None
        and default.type
        and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(attribute)
    ):
        return True
    return attribute.name in ("dilations", "strides") and set(attribute.ints) == {1}


def _short(number: int) -> str:
    digits = "abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        text = digits[number % 26] + text
        number //= 26
        if not number:
            return "_" + text


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
