"""Which layers a technique may replace one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from featherweight.data import as_call, example_inputs, forward
from featherweight.data import tensors as all_tensors
from featherweight.modes import evaluating
from featherweight.technique import Context, Layer
from featherweight.trace import module_path, trace

aten = torch.ops.aten


def first_paths(model: nn.Module) -> dict[str, str]:
    """Return, for every path of a module, its first one: a trace names a shared module by the path it was called by."""
    first = {id(module): path for path, module in model.named_modules()}
    return {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False)}


def untied(model: nn.Module, context: Context, *types: type[Layer]) -> list[tuple[str, Layer]]:
    """Return `(path, layer)` in scope whose weight no other module holds; tied ones are recorded as left alone.

    Replacing one holder of a tied weight would leave the other with a copy, and the model would grow.
    """
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    free: list[tuple[str, Layer]] = []
    for path, layer in context.targets(model, *types):
        shared = [other for other in holders[id(layer.get_parameter("weight"))] if other != path]
        if shared:
            context.leave(path, f"its weight is tied to {shared[0]}")
        else:
            free.append((path, layer))
    return free


def output_layers(model: nn.Module, context: Context, layers: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths of those layers whose output is one of the model's, such as a classifier's, and of the last one called.

    The last one is there because a softmax or the like may follow it.

    Args:
        model: comes back as it was.
        context: its data gives the example that is run.
        layers: by path.

    Raises:
        ModelError: the model cannot be run.
    """
    given: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda _, __, output: given.setdefault(path, []).extend(all_tensors(output))

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            outputs = list(all_tensors(forward(model, example_inputs(context.data, context.device))))
    finally:
        for handle in handles:
            handle.remove()
    last = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    found = {path for path, held in given.items() if any(t.untyped_storage().data_ptr() in last for t in held)}
    return found | set(list(given)[-1:])


def norm_pairs(model: nn.Module, context: Context) -> Iterator[tuple[str, str]]:
    """Yield `(norm path, layer path)` where the layer's only use is this batch norm and each runs once.

    Raises:
        ModelError: the model cannot be traced.
    """
    operators = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default)
    graph = trace(model, *as_call(example_inputs(context.data, context.device))).graph
    first = first_paths(model)
    calls = [first[module_path(node)] for node in graph.nodes if node.target in (*operators, aten.batch_norm.default)]
    for node in graph.nodes:
        if node.target is not aten.batch_norm.default:
            continue
        source = node.args[0]
        if source.target not in operators:
            continue
        norm, layer = first[module_path(node)], first[module_path(source)]
        if len(source.users) == 1 and calls.count(norm) == 1 and calls.count(layer) == 1:
            yield norm, layer
