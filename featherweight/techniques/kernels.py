"""Smaller kernels inside those of a network's convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from featherweight.edits import Cut, Keep, module_at
from featherweight.technique import Context
from featherweight.techniques.targets import untied


def elastic_kernels(model: nn.Module, context: Context) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path of each convolution whose kernel can be smaller, and the sizes it can have, its own first.

    Kernels have one odd size of 5 or more, and smaller ones odd sizes down to 3, as far as there is padding to take away.

    Args:
        model: not changed.
        context: its scope; tied weights are recorded as left alone.
    """
    for path, layer in untied(model, context, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        size = layer.kernel_size[0]
        if set(layer.kernel_size) != {size} or size % 2 == 0 or layer.padding_mode != "zeros":
            continue
        sizes = tuple(smaller for smaller in range(size, 2, -2) if min(_paddings(layer, smaller), default=0) >= 0)
        if layer.padding != "valid" and len(sizes) > 1:
            yield path, sizes


def middle(model: nn.Module, path: str, size: int) -> Keep:
    """Return the cut of a kernel to its middle, with as much less padding: what zeros around the middle would compute.

    Args:
        model: not changed.
        path: of a convolution of `elastic_kernels`.
        size: of the kernel, one of those given with it.
    """
    layer: Any = module_at(model, path)
    start, count = (layer.kernel_size[0] - size) // 2, len(layer.kernel_size)
    index = tuple(range(start, start + size))
    sizes = [(f"{path}.kernel_size.{at}", size) for at in range(count)]
    sizes += [(f"{path}.padding.{at}", pad) for at, pad in enumerate(_paddings(layer, size))]
    return Keep(tuple(Cut(f"{path}.weight", 2 + at, index) for at in range(count)), tuple(sizes))


def _paddings(layer: nn.modules.conv._ConvNd, size: int) -> list[int]:
    """The padding of each dimension with which a kernel of this size gives outputs of the same shape; none where it has a name."""
    if isinstance(layer.padding, str):
        return []
    narrower = (layer.kernel_size[0] - size) // 2
    return [pad - step * narrower for pad, step in zip(layer.padding, layer.dilation, strict=True)]
