"""Watch what flows through layers on calibration data: extremes, and an even sample of the values."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import batches, forward, tensors
from featherweight.edits import module_at
from featherweight.modes import evaluating
from featherweight.technique import Context

_KEPT = 65_536  # values of each tensor kept for choosing the range
_MOMENTUM = 0.9  # of the moving averages


@dataclass(frozen=True)
class Observed:
    """What passed: smallest and largest value, their moving averages over batches, a sample of the values.

    Attributes:
        low: smallest value.
        high: largest value.
        sample: values, `[n]`.
        average_low: moving average of the smallest value of a batch; `low` when None.
        average_high: the same of the largest.
        mean: of each channel of what entered a linear layer or a convolution, `[in]`.
        batches: how many passed.
    """

    low: float
    high: float
    sample: Tensor
    average_low: float | None = None
    average_high: float | None = None
    mean: Tensor | None = None
    batches: int = 1


def observe(
    model: nn.Module, context: Context, paths: Iterable[str], count: int, leaving: Container[str] = (), keep: int = 0
) -> tuple[dict[str, Observed], dict[str, Observed], list[Any]]:
    """Run calibration batches and return what entered layers and what left some, by path, and the model's first outputs.

    Args:
        model: run in evaluation mode as it is; its hooks are removed again, also on error.
        context: gives the loader and the device.
        paths: dotted paths of layers that take and return one tensor.
        count: batches to read.
        leaving: those of the paths whose outputs are watched too.
        keep: batches of which the model's outputs are returned.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    entered: dict[str, Observed] = {}
    left: dict[str, Observed] = {}
    handles, outputs = [], list[Any]()

    def hook(path: str) -> None:
        def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            value = next(tensors((args, kwargs)))
            _update(entered, path, value, _channel_means(layer, value))
            if path in leaving:
                _update(left, path, output)

        handles.append(module_at(model, path).register_forward_hook(see, with_kwargs=True))

    try:
        for path in paths:
            hook(path)
        with evaluating(model):
            for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), count):
                output = forward(model, inputs)
                outputs += [output] if len(outputs) < keep else []
    finally:
        for handle in handles:
            handle.remove()
    return entered, left, outputs


def _channel_means(layer: nn.Module, value: Tensor) -> Tensor:
    """Of what enters a linear layer, the mean of each feature; of what enters a convolution, of each channel."""
    axes = len(getattr(layer, "kernel_size", ()))
    channel = value.dim() - 1 - axes
    return value.detach().float().mean([place for place in range(value.dim()) if place != channel])


def _update(seen: dict[str, Observed], path: str, value: Tensor, mean: Tensor | None = None) -> None:
    flat = value.detach().flatten().float().cpu()
    sample = flat[:: _stride(flat.numel())]
    low, high = (float(extreme) for extreme in torch.aminmax(flat))
    if path not in seen:
        seen[path] = Observed(low, high, sample, low, high, mean)
        return
    before = seen[path]
    sample = torch.cat([before.sample, sample])
    if sample.numel() > _KEPT:
        sample = sample[::2]
    averages = [
        _MOMENTUM * float(old or 0.0) + (1 - _MOMENTUM) * new
        for old, new in ((before.average_low, low), (before.average_high, high))
    ]
    count = before.batches + 1
    if mean is not None and before.mean is not None:
        mean = before.mean + (mean - before.mean) / count
    low, high = min(low, before.low), max(high, before.high)
    seen[path] = Observed(low, high, sample, averages[0], averages[1], mean, count)


def _stride(values: int) -> int:
    """A step through so many values that shares no factor with any dimension, so that every channel and place is met."""
    step = max(1, values // (_KEPT // 8))
    while step > 1 and math.gcd(step, values) > 1:
        step += 1
    return step
