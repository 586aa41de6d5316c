"""A dense convolution's cheaper cousin: one filter an input channel, and a pointwise convolution after them."""

from __future__ import annotations

from torch import nn

from featherweight.layers.plain import convolution


def depthwise_separable_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    bias: bool = True,
) -> nn.Module:
    """Return a depthwise convolution of `in_channels` and a pointwise one to `out_channels` (Howard et al., 2017)."""
    ones = [1] * len(kernel_size)
    return nn.Sequential(
        convolution(in_channels, in_channels, kernel_size, stride, padding, dilation, groups=in_channels, bias=False),
        convolution(in_channels, out_channels, ones, ones, [0] * len(kernel_size), ones, bias=bias),
    )
