"""Where a factor may move between layers: a channel that leaves one and enters others through nothing but positive scaling."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from featherweight.data import as_call, example_inputs
from featherweight.edits import module_at
from featherweight.technique import Context
from featherweight.techniques.targets import first_paths
from featherweight.trace import module_path, trace

aten = torch.ops.aten
_CONVOLVE = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_COMPUTE = (*_CONVOLVE, aten.linear.default)
_SCALING = {  # f(s x) = s f(x) for s > 0
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.dropout.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool2d.default,
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Link:
    """Channels that one layer makes and others read, and nobody else.

    Attributes:
        producer: path of a linear layer, a convolution or a layer norm with weights; None where what a linear layer reads is read by
            others too, or is made by something that no factor passes through.
        consumers: paths of linear layers or convolutions.
    """

    producer: str | None
    consumers: tuple[str, ...]


def links(model: nn.Module, context: Context) -> list[Link]:
    """Return the links between layers in scope, each called once and with a weight of its own, in the order of their calls.

    The linear layers that have none come last, each with no producer.

    Raises:
        ModelError: the model cannot be traced.
    """
    graph = trace(model, *as_call(example_inputs(context.data, context.device))).graph
    first = first_paths(model)
    held = Counter(
        id(value) for module in model.modules() for value in module._parameters.values() if value is not None
    )
    calls = Counter(
        first[module_path(node)] for node in graph.nodes if node.target in (*_COMPUTE, aten.layer_norm.default)
    )

    def free(path: str) -> bool:
        layer = module_at(model, path)
        kinds = (nn.Linear, nn.LayerNorm, *_CONVOLUTIONS)
        weight = getattr(layer, "weight", None)
        return (
            type(layer) in kinds
            and weight is not None
            and held[id(weight)] == calls[path] == 1
            and context.in_scope(path)
        )

    found = list[Link]()
    for node in graph.nodes:
        if node.target not in (*_COMPUTE, aten.layer_norm.default):
            continue
        ends = _ends(node)
        if ends is None:
            continue
        path, consumers = first[module_path(node)], tuple(dict.fromkeys(first[module_path(end)] for end in ends))
        convolves = node.target in _CONVOLVE
        alike = all((end.target in _CONVOLVE) == convolves for end in ends)
        if alike and all(map(free, (path, *consumers))) and _last_dimension_alone(module_at(model, path)):
            found.append(Link(path, consumers))
    linked = {path for link in found for path in link.consumers}
    linear = [first[module_path(node)] for node in graph.nodes if node.target == aten.linear.default]
    alone = [path for path in linear if path not in linked and type(module_at(model, path)) is nn.Linear and free(path)]
    return [*found, *(Link(None, (path,)) for path in alone)]


def _ends(node: Node) -> list[Node] | None:
    """The layers that read what a node makes; None if anything else does."""
    ends: list[Node] = []
    for user in node.users:
        if user.target in _COMPUTE and user.args[0] is node:
            ends.append(user)
        elif user.target in _SCALING and user.args[0] is node:
            further = _ends(user)
            if further is None:
                return None
            ends += further
        else:
            return None
    return ends or None


def _last_dimension_alone(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.LayerNorm) or len(layer.normalized_shape) == 1


def divided(weight: Tensor, bias: Tensor | None, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight `[out, ...]` and bias `[out]` of a producer whose channels are divided by `factors`, `[out]`."""
    column = factors.reshape(-1, *[1] * (weight.dim() - 1))
    return weight / column, None if bias is None else bias / factors


def multiplied(weight: Tensor, factors: Tensor) -> Tensor:
    """Return the weight `[out, in / groups, ...]` of a consumer whose input channels `[in]` were divided by `factors`."""
    groups = len(factors) // weight.shape[1]
    by_group = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return (by_group * factors.reshape(groups, 1, -1, 1)).reshape(weight.shape)


def reach(weight: Tensor, channels: int) -> Tensor:
    """Return the largest magnitude of what meets each input channel, `[in]`, of a weight `[out, in / groups, ...]`."""
    groups = channels // weight.shape[1]
    return weight.abs().reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()
