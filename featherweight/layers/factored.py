"""One layer as two or three ordinary ones in a row, with fewer weights between them: what factorization puts in place."""

from __future__ import annotations

from torch import nn

from featherweight.layers.plain import convolution


def factored_linear(in_features: int, rank: int, out_features: int, bias: bool = True) -> nn.Module:
    """Return two linear layers in a row, `in -> rank -> out`."""
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias))


def factored_convolution(
    in_channels: int,
    rank: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    bias: bool = True,
) -> nn.Module:
    """Return a convolution to `rank` channels and a pointwise one to `out_channels` (Zhang et al., 2016)."""
    ones = [1] * len(kernel_size)
    return nn.Sequential(
        convolution(in_channels, rank, kernel_size, stride, padding, dilation, bias=False),
        convolution(rank, out_channels, ones, ones, [0] * len(kernel_size), ones, bias=bias),
    )


def separable_convolution(
    in_channels: int,
    rank: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    bias: bool = True,
) -> nn.Module:
    """Return a column of `d x 1` weights to `rank` channels and a row of `1 x d` to `out_channels` (Tai et al., 2016)."""
    (tall, wide), (down, right), (below, beside) = kernel_size, stride, dilation
    pads = (padding, padding) if isinstance(padding, str) else ([padding[0], 0], [0, padding[1]])
    return nn.Sequential(
        convolution(in_channels, rank, [tall, 1], [down, 1], pads[0], [below, 1], bias=False),
        convolution(rank, out_channels, [1, wide], [1, right], pads[1], [1, beside], bias=bias),
    )


def tucker_convolution(
    in_channels: int,
    first_rank: int,
    second_rank: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    bias: bool = True,
) -> nn.Module:
    """Return a pointwise convolution, one over the taps between the two ranks, and a pointwise one (Kim et al., 2016)."""
    ones, nothing = [1] * len(kernel_size), [0] * len(kernel_size)
    return nn.Sequential(
        convolution(in_channels, first_rank, ones, ones, nothing, ones, bias=False),
        convolution(first_rank, second_rank, kernel_size, stride, padding, dilation, bias=False),
        convolution(second_rank, out_channels, ones, ones, nothing, ones, bias=bias),
    )


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


def canonical_convolution(
    in_channels: int,
    rank: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    bias: bool = True,
) -> nn.Module:
    """Return a pointwise convolution to `rank` channels, a column and a row within each, and a pointwise one (Lebedev, 2015)."""
    (tall, wide), (down, right), (below, beside) = kernel_size, stride, dilation
    pads = (padding, padding) if isinstance(padding, str) else ([padding[0], 0], [0, padding[1]])
    return nn.Sequential(
        convolution(in_channels, rank, [1, 1], [1, 1], [0, 0], [1, 1], bias=False),
        convolution(rank, rank, [tall, 1], [down, 1], pads[0], [below, 1], groups=rank, bias=False),
        convolution(rank, rank, [1, wide], [1, right], pads[1], [1, beside], groups=rank, bias=False),
        convolution(rank, out_channels, [1, 1], [1, 1], [0, 0], [1, 1], bias=bias),
    )
