"""Push labels through the exported graph of a model, node by node."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from featherweight.graph.atoms import Atoms
from featherweight.graph.labels import Call, Value, unknown
from featherweight.graph.operators import apply
from featherweight.trace import where


def tensors_of(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for every name of a parameter or buffer its first name (ties have several) and its shape."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names[name] = (first.setdefault(id(tensor), name), tuple(tensor.shape))
    return names


def walk(program: ExportedProgram, tensors: dict[str, tuple[str, tuple[int, ...]]], atoms: Atoms) -> None:
    """Push labels through every node of the exported graph."""
    made: dict[str, Value] = {}
    inputs: dict[str, Value] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in tensors:
            name, shape = tensors[spec.target]
            made[name] = made[name] if name in made else atoms.tensor(name, shape)
            inputs[spec.arg.name] = made[name]
    constants = {s.arg.name for s in program.graph_signature.input_specs if s.kind is not InputKind.USER_INPUT}
    known: dict[Node, Any] = {}
    for node in program.graph.nodes:
        shapes, dynamic = _shapes(node)
        if node.op == "placeholder":
            default = Value(shapes[0], static=node.name in constants) if shapes else None
            known[node] = inputs.get(node.name, default)
        elif node.op == "output":
            _outputs(program, node, known, atoms)
        elif node.target is operator.getitem:
            whole = known[node.args[0]]
            known[node] = whole[node.args[1]] if isinstance(whole, tuple) else whole
        elif node.op == "call_function" and "_assert" not in str(node.target):
            args, kwargs = pytree.tree_map_only(Node, lambda n: known.get(n), (node.args, node.kwargs))
            feeds = frozenset(_name(user) for step in (node, *node.users) for user in step.users)
            call = Call(node.target, _name(node), tuple(args), dict(kwargs), shapes or ((),), atoms, where(node), feeds)
            known[node] = unknown(call, "has a size that depends on the data") if dynamic else apply(call)


def _name(node: Node) -> str:
    """Return the operator's name without namespace, overload and the underscore of in-place variants."""
    name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))
    return name if name.startswith("_") else name.rstrip("_")


def _shapes(node: Node) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Return the shapes of a node's tensor results, and whether any size is only known at run time."""
    leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    dynamic = any(not isinstance(size, int) for leaf in leaves for size in leaf.shape)
    return tuple(tuple(s if isinstance(s, int) else 1 for s in leaf.shape) for leaf in leaves), dynamic


def _outputs(program: ExportedProgram, node: Node, known: dict[Node, Any], atoms: Atoms) -> None:
    """Pin what the model returns: its shape is a promise to the caller."""
    leaves = pytree.tree_leaves(node.args[0])
    for spec, leaf in zip(program.graph_signature.output_specs, leaves, strict=True):
        value = known.get(leaf) if isinstance(leaf, Node) else None
        kind = "an output of the model" if spec.kind is OutputKind.USER_OUTPUT else "written back into the model"
        for layer in value.layers if isinstance(value, Value) else ():
            atoms.pin(layer, f"it is {kind}")
