"""Ordinary `torch.nn` layers as kinds: what folding leaves behind, and what the other kinds are made of."""

from __future__ import annotations

from torch import nn

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


def identity() -> nn.Module:
    """Return a layer that passes its input on: what a folded normalization becomes."""
    return nn.Identity()


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Module:
    """Return an `nn.Linear`."""
    return nn.Linear(in_features, out_features, bias=bias)


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    """Return an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, by the length of `kernel_size`."""
    return _CONVOLUTIONS[len(kernel_size)](
        in_channels,
        out_channels,
        tuple(kernel_size),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        padding=padding if isinstance(padding, str) else tuple(padding),  # type: ignore[arg-type]
        dilation=tuple(dilation),  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
    )


def convolution_options(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> dict[str, object]:
    """Return the JSON-able options that build a convolution like `layer` anew."""
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": layer.padding if isinstance(layer.padding, str) else list(layer.padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
    }
