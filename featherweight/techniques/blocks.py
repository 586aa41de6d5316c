"""Which modules of a model are residual blocks: they add to their input what they compute, and can be left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge

from featherweight.data import Inputs, forward, tensors
from featherweight.edits import Swap, module_at
from featherweight.layers.skip import first_tensor, output_structure
from featherweight.modes import evaluating
from featherweight.trace import unfused

# What may stand between a block's input and its output beside the addition; anything else would have to be undone.
_CARRIES = {
    "Add",
    "Relu",
    "Gelu",
    "Silu",
    "LeakyRelu",
    "Elu",
    "Hardtanh",
    "Hardswish",
    "NativeLayerNorm",
    "NativeBatchNorm",
    "NativeGroupNorm",
    "CudnnBatchNorm",
    "NativeDropout",
    "ToCopy",
    "Clone",
    "Alias",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Permute",
    "Transpose",
    "T",
    "Squeeze",
    "Unsqueeze",
}


@dataclass
class Call:
    """What one module was called with and gave: the autograd node of its input, shapes, types, output."""

    source: Node
    shape: torch.Size
    dtype: torch.dtype
    output: Any = None
    count: int = 0


def residual_blocks(model: nn.Module, inputs: Inputs) -> dict[str, Swap]:
    """Return, for each residual block, the Swap by `skip` that leaves it out, in the order of the model.

    A block is a module with children, called once, whose output is one tensor of the shape and type of its first tensor
    argument, which reaches that output through an addition and otherwise through pointwise operators and normalizations
    alone. A module that holds two blocks or more is a stack of them and not a block; inside a block there are no others.

    Args:
        model: run once in evaluation mode; its hooks are removed again, also on error.
        inputs: of one batch.
    """
    calls: dict[str, Call] = {}
    with evaluating(model), unfused(), _watched(model, calls), torch.enable_grad():
        forward(model, inputs)
    found: dict[str, Swap] = {}
    for path in reversed([path for path, _ in model.named_modules() if path in calls]):
        structure = _structure(calls[path])
        inside = [other for other in found if other.startswith(path + ".")]
        if structure is not None and len(inside) < 2:
            for other in inside:
                del found[other]
            found[path] = Swap(path, "skip", {"structure": structure, **_container(module_at(model, path))}, {})
    return dict(reversed(found.items()))


@contextmanager
def _watched(model: nn.Module, calls: dict[str, Call]) -> Iterator[None]:
    """Record the call of every inner module that has children, while the block runs with gradients."""

    def watch(path: str, module: nn.Module) -> list[Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = first_tensor(args, kwargs)
            if given is None or not given.is_floating_point():
                return None
            tracked = given if given.requires_grad else given.detach().requires_grad_().clone()
            count = calls[path].count + 1 if path in calls else 1
            calls[path] = Call(get_gradient_edge(tracked).node, given.shape, given.dtype, count=count)
            replaced = tuple(tracked if value is given else value for value in args)
            return replaced, {name: tracked if value is given else value for name, value in kwargs.items()}

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if path in calls:
                calls[path].output = output

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]

    handles: list[Any] = []
    try:
        for path, module in model.named_modules():
            if path and next(module.children(), None) is not None:
                handles += watch(path, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _structure(call: Call) -> Any:
    """The structure of the output, or None where the module is no residual block."""
    try:
        structure = output_structure(call.output)
    except ValueError:
        return None
    output = next(tensors(call.output))
    same = output.shape == call.shape and output.dtype == call.dtype
    return structure if call.count == 1 and same and _adds_its_input(output.grad_fn, call.source) else None


def _adds_its_input(end: Node | None, source: Node) -> bool:
    """Whether a way back from `end` to `source` leads through an addition and nothing that mixes values."""
    waiting, seen = [(end, False)], set()
    while waiting:
        node, added = waiting.pop()
        if node is source and added:
            return True
        if node is None or node is source or (node, added) in seen:
            continue
        seen.add((node, added))
        kind = node.name().partition("Backward")[0]
        if kind in _CARRIES:
            waiting += [(before, added or kind == "Add") for before, _ in node.next_functions]
    return False


def _container(module: nn.Module) -> dict[str, Any]:
    """What a stack of PyTorch's own Transformer layers wants to know from each of them."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return {"batch_first": bool(module.self_attn.batch_first)}
    return {}
