"""Convolutions that store integer codes; of a transposed one, outputs lie along the second dimension of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from featherweight.layers.quantized import QuantizedLayer


class QuantizedConv(QuantizedLayer):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` over codes `[out_channels, in_channels / groups, *kernel_size]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        bits: int,
        stride: list[int],
        padding: list[int] | str,
        dilation: list[int],
        groups: int = 1,
        bias: bool = True,
        per_channel: bool = True,
        input_grid: bool = False,
        output_grid: bool = False,
        **grid: Any,
    ) -> None:
        super().__init__(
            (out_channels, in_channels // groups, *kernel_size),
            bits=bits,
            bias=bias,
            per_channel=per_channel,
            input_grid=input_grid,
            output_grid=output_grid,
            **grid,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.groups = groups
        self.geometry: dict[str, Any] = {"stride": tuple(stride), "padding": padding, "dilation": tuple(dilation)}

    def operate(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Convolve `[batch, in_channels, *spatial]` with the weight."""
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        output: Tensor = convolution(inputs, weight, self._offset(), groups=self.groups, **self.geometry)
        return output


class QuantizedTransposedConv(QuantizedLayer):
    """`nn.ConvTranspose1d/2d/3d` over codes `[in_channels, out_channels / groups, *kernel_size]`; a scale an output channel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        bits: int,
        stride: list[int],
        padding: list[int],
        output_padding: list[int],
        dilation: list[int],
        groups: int = 1,
        bias: bool = True,
        per_channel: bool = True,
        **grid: Any,
    ) -> None:
        super().__init__(
            (in_channels, out_channels // groups, *kernel_size),
            bits=bits,
            bias=bias,
            per_channel=per_channel,
            channels=out_channels,
            **grid,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.output_padding = tuple(output_padding)
        self.dilation = tuple(dilation)
        self.groups = groups

    def rows(self, weight: Tensor) -> Tensor:
        """As of every kind: by output channel, group after group."""
        by_group = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return by_group.reshape(self.scale.numel(), -1)

    def steps(self, scale: Tensor) -> Tensor:
        """As of every kind."""
        if scale.numel() == 1:
            return super().steps(scale)
        inputs = self.in_channels // self.groups
        by_input = scale.reshape(self.groups, 1, -1).expand(-1, inputs, -1) if self.groups > 1 else scale
        return by_input.reshape(-1, self.out_channels // self.groups, *[1] * len(self.kernel_size))

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve `[batch, in_channels, *spatial]`; `output_size` picks among the sizes a stride leaves open, as in PyTorch."""
        added = self.output_padding if output_size is None else self._added(input, output_size)
        axes = len(self.kernel_size)
        convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        weight, bias = self.dequantized(), self._offset()
        output: Tensor = convolution(
            input, weight, bias, self.stride, self.padding, added, groups=self.groups, dilation=self.dilation
        )
        return output

    def _added(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """The output padding that makes the last dimensions of the output `output_size`."""
        axes = len(self.kernel_size)
        settings = zip(self.stride, self.padding, self.dilation, self.kernel_size, strict=True)
        least = [
            (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
            for size, (stride, padding, dilation, kernel) in zip(input.shape[-axes:], settings, strict=True)
        ]
        return tuple(size - smallest for size, smallest in zip(output_size[-axes:], least, strict=True))
