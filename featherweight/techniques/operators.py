"""Cheaper operators that may stand in for a layer, and a mixture of them all that says in training which it should be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import example_inputs, forward
from featherweight.edits import Swap, apply, module_at
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.low_rank import factorable, low_rank_swap
from featherweight.techniques.separate_convolutions import refusal, separable_swap
from featherweight.techniques.targets import untied
from featherweight.trace import unfused

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stand_ins(model: nn.Module, context: Context, ratio: float) -> dict[str, list[Swap]]:
    """Return, by path, the Swaps of each layer in scope by the operators that could replace it; others are recorded.

    They are a depthwise-separable pair, two layers of low rank and the identity, where they apply: all have fewer weights
    than the layer, and the nearest to its own.

    Args:
        model: run once in evaluation mode; it comes back as it was.
        context: its scope, the example, and where to record.
        ratio: share of a layer's parameters that low rank removes, 0 to 1.
    """
    written = _written(model, context)
    found: dict[str, list[Swap]] = {}
    for path, layer in untied(model, context, nn.Linear, *_CONVOLUTIONS):
        if not factorable(path, layer, context):
            continue
        separable = isinstance(layer, _CONVOLUTIONS) and not refusal(layer, minimum=1)
        low = low_rank_swap(path, layer, ratio)
        swaps = [separable_swap(path, layer)] if separable else []  # type: ignore[arg-type]
        swaps += [low] if low is not None else []
        swaps += [Swap(path, "identity", {}, {})] if _keeps_shape(layer) and layer not in written else []
        if swaps:
            found[path] = swaps
        else:
            context.leave(path, "no cheaper operator fits its shape")
    return found


def _keeps_shape(layer: nn.Module) -> bool:
    """Whether the output always has the shape of the input."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    if not isinstance(layer, _CONVOLUTIONS) or layer.in_channels != layer.out_channels or max(layer.stride) > 1:
        return False
    if layer.padding == "same":
        return True
    pads: Any = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    spans = zip(pads, layer.dilation, layer.kernel_size, strict=True)
    return all(2 * pad == step * (size - 1) for pad, step, size in spans)


def _written(model: nn.Module, context: Context) -> set[nn.Module]:
    """The layers whose output is written to in place: an identity would hand out its input for that, which others read."""
    outputs: list[tuple[nn.Module, Tensor, int]] = []

    def see(layer: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append((layer, output, output._version))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        with unfused(), evaluating(model):
            forward(model, example_inputs(context.data, context.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer for layer, output, version in outputs if output._version > version}


class Operators(nn.Module):
    """A layer and its stand-ins, whose outputs are added up by the softmax of logits; at last only the best one runs.

    It hangs in the layer, whose hook it is, so that every tensor of the model keeps its name.

    Args:
        model: what holds the layer; it gets the hook.
        swaps: of the layer by its stand-ins.
        pace: factor on the logits, above 0: how much faster they move than other tensors.

    Attributes:
        logits: `[1 + stand-ins]`, the layer's own first.
        decided: place of the operator that runs alone, or None while all of them do.
        weights: how many each operator has, `[1 + stand-ins]`, for one use of each.
    """

    def __init__(self, model: nn.Module, swaps: list[Swap], pace: float) -> None:
        super().__init__()
        layer = module_at(model, swaps[0].path)
        self.swaps, self._pace = swaps, pace
        self.stand_ins = nn.ModuleList(_built(model, swap) for swap in swaps)
        device = layer.get_parameter("weight").device
        counts = [_weights(operator) for operator in (layer, *self.stand_ins)]
        self.weights = torch.tensor(counts, dtype=torch.float32, device=device)
        self.logits = nn.Parameter(torch.zeros(len(counts), device=device))
        self.decided: int | None = None
        layer.add_module("operators", self)
        layer.register_forward_hook(self._mixed, with_kwargs=True)

    def shares(self) -> Tensor:
        """Return how much of each operator is in the mixture, `[1 + stand-ins]`, sum 1."""
        return (self._pace * self.logits).softmax(0)

    def best(self) -> int:
        """Return the place of the operator of the greatest logit, the first of equals; 0 is the layer itself."""
        logits = self.logits.tolist()
        return logits.index(max(logits))

    def taken(self) -> Swap | None:
        """Return the Swap by the best operator with its weights as they are, or None where that is the layer itself."""
        place = self.best() - 1
        if place < 0:
            return None
        swap, state = self.swaps[place], self.stand_ins[place].state_dict()
        return Swap(swap.path, swap.kind, swap.options, {name: value.clone() for name, value in state.items()})

    def _mixed(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dense: Tensor) -> Tensor:
        if self.decided is not None:
            return self.stand_ins[self.decided - 1](*args, **kwargs) if self.decided else dense
        own, *others = self.shares().unbind()
        mixed = own * dense
        for share, operator in zip(others, self.stand_ins, strict=True):
            mixed = mixed + share * operator(*args, **kwargs)
        return mixed


def _built(model: nn.Module, swap: Swap) -> nn.Module:
    """The layer that a Swap would put into the model, where the model lies."""
    undo = apply(model, swap)
    try:
        return module_at(model, swap.path)
    finally:
        undo()


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
