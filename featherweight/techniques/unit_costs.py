"""What one unit of a coupled group costs at each call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from featherweight.data import example_inputs, forward, samples, tensors
from featherweight.edits import named_tensors
from featherweight.graph import CoupledGroup
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.trace import unfused

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)


def unit_macs(model: nn.Module, groups: Sequence[CoupledGroup], context: Context) -> list[float]:
    """Return the multiply-adds of one sample that each unit of a group takes with it, while all others stay.

    Every entry of a weight is used once for each position of the layer's output; layers that are called functionally count
    one position. At least 1, so that it can divide.

    Args:
        model: comes back as it was.
        groups: of this model.
        context: gives the example.
    """
    used = uses(model, context)
    named = named_tensors(model)
    return [
        max(1.0, sum(_entries(group, member, named, used) for member in range(len(group.members)))) for group in groups
    ]


def uses(model: nn.Module, context: Context) -> dict[int, float]:
    """Return how often one sample uses each entry of a parameter, by the parameter's `id`: once a position of the output.

    Args:
        model: comes back as it was.
        context: gives the example.
    """
    inputs = example_inputs(context.data, context.device)
    positions: dict[int, float] = {}

    def see(layer: nn.Module, _: Any, output: Any) -> None:
        value = next(tensors(output))
        channels = value.shape[-1 - len(getattr(layer, "kernel_size", ()))]
        positions[id(layer)] = positions.get(id(layer), 0.0) + value.numel() / channels / samples(inputs)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _LAYERS):
                stack.callback(module.register_forward_hook(see).remove)
        stack.enter_context(unfused())
        stack.enter_context(evaluating(model))
        forward(model, inputs)
    return {
        id(parameter): positions.get(id(module), 1.0)
        for module in model.modules()
        for parameter in module._parameters.values()
    }


def _entries(group: CoupledGroup, member: int, named: dict[str, Tensor], used: dict[int, float]) -> float:
    name, dim = group.members[member]
    tensor = named[name]
    if tensor.dim() < 2:
        return 0.0
    return tensor.numel() / tensor.shape[dim] * len(group.units[0][member]) * used.get(id(tensor), 1.0)
