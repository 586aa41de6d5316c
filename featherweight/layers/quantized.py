"""What layers of integer codes and scales share, and the linear one; they compute with PyTorch's reference operators.

Where activations are quantized too, the forward dequantizes with `quantized_decomposed` operators, which export to ONNX
QuantizeLinear and DequantizeLinear, so that runtimes compute integers; weight-only layers multiply `codes * scale`, which
runtimes fold into a float weight at load. `thaw` turns codes into float latents with
straight-through gradients for training (LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020), `freeze`
rounds them back.
"""

from __future__ import annotations

from typing import Any

import torch

# Registers the reference operators; they may move, and this is the only place that names where they live.
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.layers.signs import sign

reference = torch.ops.quantized_decomposed
_SMALLEST = 1e-8  # step
_REACH = 2.0  # steps within which gradients pass a sign


def limit(bits: int) -> int:
    """Largest code of a symmetric grid of `bits` bits, 2 to 8: 127, 7, 1 for 8, 4, 2; the smallest is its negative."""
    return int(2 ** (bits - 1) - 1)


def span(bits: int, full: bool = False) -> tuple[int, int]:
    """Return smallest and largest code of a weight: signs at 1 bit, else symmetric, or with one more code below zero.

    Args:
        bits: 1 to 8.
        full: whether all `2 ** bits` codes are used, as in LSQ: -2 to 1 at 2 bits, where a symmetric grid is ternary.
    """
    high = limit(bits) if bits > 1 else 1
    return -high - (full and bits > 1), high


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """Round float32 values to `bits` significant bits, 1 to 24, so that they take fewer bytes when coded."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent).to(values.dtype)


def round_together(values: Tensor, bits: int) -> Tensor:
    """Round float32 values to multiples of one power of two, the largest to `bits` significant bits, 1 to 24.

    So biases become whole numbers of one step, which take few bytes when coded.
    """
    largest = values.detach().abs().amax() if values.numel() else values.new_zeros(())
    octave = torch.frexp(largest)[1] - bits
    return torch.ldexp(torch.round(torch.ldexp(values.double(), -octave)), octave).to(values.dtype) + 0.0  # no -0.0


def significant_bits(bits: int) -> int:
    """Significant bits kept in the scales and biases of a layer with `bits`-bit codes: a few more than the codes."""
    return 8 if bits <= 6 else 12


def slowed(values: Tensor, factor: Tensor | float) -> Tensor:
    """Return the values; their gradient is multiplied by a factor."""
    return values * factor + (values - values * factor).detach()


class _FakeQuantize(torch.autograd.Function):
    """One pass each way over what can be large activations, where a chain of operators would make ten."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        places = values / scale + zero
        codes = places.clamp(low, high).round_()
        ctx.save_for_backward(places, codes)
        ctx.zero, ctx.range, ctx.slower, ctx.shape = zero, (low, high), gradient_scale, scale.shape
        return (codes - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (places, codes), (low, high) = gradients, ctx.saved_tensors, ctx.range
        inside = gradient * ((places >= low) & (places <= high))
        moved = (codes - ctx.zero).mul_(gradient).sub_((places - ctx.zero).mul_(inside))
        return inside, moved.sum_to_size(ctx.shape) * ctx.slower, None, None, None, None


def fake_quantize(
    values: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float, zero: Tensor | float = 0.0
) -> Tensor:
    """Round `values / scale + zero` to the integers `low..high` and scale back; straight-through gradients (LSQ, 2020).

    Args:
        values: any shape.
        scale: broadcastable to `values`, positive.
        low: smallest code.
        high: largest code.
        gradient_scale: factor on the gradient of the scale, `1 / sqrt(n * high)` in the paper.
        zero: code that stands for 0.
    """
    rounded: Tensor = _FakeQuantize.apply(values, scale, zero, low, high, gradient_scale)  # type: ignore[no-untyped-call]
    return rounded


class QuantizedLayer(nn.Module):
    """What all kinds share: codes, scales, input and output grids, thaw and freeze.

    Buffers: `codes` int8 shaped like the float weight; `scale` float32 `[out]`, or `[1]` for one scale a tensor;
    where activations are static, `input_scale` float32 `[]` and `input_zero` uint8 `[]`, and the same for the output.

    Args:
        shape: of the codes.
        bits: width of the codes, 1 to 8; codes of 1 bit are signs.
        bias: whether there is one, `[channels]`.
        per_channel: one scale for each channel, or one in all.
        input_grid: whether inputs are rounded.
        output_grid: whether outputs are, to 8 bits.
        channels: number of outputs, where it is not the first dimension of the codes.
        full: whether the codes are those of `span` with one more below zero.
        input_bits: width of the grid of the inputs, 1 to 8; its codes are the first of 256.
        input_signs: whether inputs become signs times a step, codes 0 and 2 around a zero of 1.
        gradient: of signs; a name in `signs.SURROGATES`.
    """

    codes: Tensor | None
    scale: Tensor
    bias: Tensor | None
    weight: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        bits: int,
        bias: bool,
        per_channel: bool,
        input_grid: bool = False,
        output_grid: bool = False,
        channels: int | None = None,
        full: bool = False,
        input_bits: int = 8,
        input_signs: bool = False,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__()
        channels = shape[0] if channels is None else channels
        self.bits = bits
        self.full = full
        self.input_bits = input_bits
        self.input_signs = input_signs
        self.gradient = gradient
        self.axes = len(shape) - 1
        self.input_grid = input_grid
        self.output_grid = output_grid
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(channels if per_channel else 1))
        for grid, name in ((input_grid, "input"), (output_grid, "output")):
            if grid:
                self.register_buffer(f"{name}_scale", torch.tensor(1.0))
                self.register_buffer(f"{name}_zero", torch.tensor(0, dtype=torch.uint8))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)

    def rows(self, weight: Tensor) -> Tensor:
        """The float weight as `[scales, values]`: each row is what shares a scale, in the order of the scales."""
        return weight.reshape(self.scale.numel(), -1)

    def steps(self, scale: Tensor) -> Tensor:
        """A scale like the layer's own, shaped to be multiplied with the codes."""
        return scale.reshape(-1, *[1] * self.axes)

    def dequantized(self, integers: bool = False) -> Tensor:
        """The float weight that the codes stand for, shaped like them.

        Args:
            integers: decode it with the operator that runtimes know integer layers by, where it is not in training.
        """
        if self.codes is None and not self.training:
            codes, scale = self._rounded()
            return codes * self.steps(scale)
        if self.codes is None:
            return self._trained(self.get_parameter("weight"), self.steps(self.scale))
        if not integers:  # plain arithmetic, which every runtime computes once, at load
            return self.codes.to(self.scale.dtype) * self.steps(self.scale)
        low, high = span(self.bits, self.full)
        scale = self.scale.expand(self.codes.shape[0])
        decoded: Tensor = reference.dequantize_per_channel(self.codes, scale, None, 0, low, high, torch.int8)
        return decoded

    def _trained(self, weight: Tensor, steps: Tensor) -> Tensor:
        """Latents, all or some, on their grid: gradients go straight through, and to the steps."""
        (low, high), steps = span(self.bits, self.full), steps.abs().clamp_min(_SMALLEST)
        slower = (self.get_parameter("weight").numel() / self.scale.numel() * high) ** -0.5
        if self.bits == 1:
            return sign(weight / steps.detach() / _REACH, self.gradient) * slowed(steps, slower)
        return fake_quantize(weight, steps, low, high, slower)

    def _on_grid(self, values: Tensor, name: str, bits: int = 8) -> Tensor:
        scale: Tensor = getattr(self, f"{name}_scale")
        zero, high = self.get_buffer(f"{name}_zero"), 2**bits - 1
        signs = self.input_signs and name == "input"
        if self.codes is None and self.training:
            step, slower = scale.abs().clamp_min(_SMALLEST), (values[0].numel() * high) ** -0.5
            if signs:
                return sign(values / scale.detach() / _REACH, self.gradient) * slowed(step, slower)
            return fake_quantize(values, step, 0, high, slower, zero.to(values.dtype))
        if signs:
            values = torch.where(values < 0, -scale, scale)
        elif bits < 8:  # saturation of the 256 codes is all that operators of ONNX do
            values = torch.minimum(values, (high - zero.to(scale.dtype)) * scale)
        codes = reference.quantize_per_tensor.tensor(values, scale, zero, 0, 255, torch.uint8)
        decoded: Tensor = reference.dequantize_per_tensor.tensor(codes, scale, zero, 0, 255, torch.uint8)
        return decoded

    def rounded(self, input: Tensor) -> Tensor:
        """The input on its grid, any shape."""
        return self._on_grid(input, "input", self.input_bits)

    def operate(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The layer's operator on float inputs and weight."""
        raise TypeError(f"{type(self).__name__} does not define its operator")

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer; input and output are float, and named as `nn.Linear` names them, for calls by keyword."""
        integers = self.input_grid and isinstance(
            input, Tensor
        )  # a recurrent layer reads its matrix off and passes none
        output = self.operate(self.rounded(input) if integers else input, self.dequantized(integers))
        return self._on_grid(output, "output") if self.output_grid else output

    def thaw(self) -> None:
        """Replace the codes by a trainable float `weight`, and make the scales trainable, those of activations too."""
        weight = self.dequantized().detach().clone()
        self.codes = None
        for name in self._scales():
            scale = self.get_buffer(name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(scale.clone()))
        self.register_parameter("weight", nn.Parameter(weight))

    def _scales(self) -> list[str]:
        """Names of the scales: of weights, and of activations where they have grids."""
        return ["scale", *(["input_scale"] if self.input_grid else []), *(["output_scale"] if self.output_grid else [])]

    def steps_in_training(self) -> list[nn.Parameter]:
        """The scales of a thawed layer, which want a smaller learning rate than weights."""
        return [self.get_parameter(name) for name in self._scales()]

    def freeze(self) -> None:
        """Round the trained latents back to codes, and scales and bias to the bits they are stored with."""
        codes, scale = self._rounded()
        self._round_bias()
        scales = {name: getattr(self, name).detach().abs().clamp_min(_SMALLEST) for name in self._scales()}
        for name, value in (scales | {"scale": scale}).items():
            delattr(self, name)
            self.register_buffer(name, value)
        del self.weight
        self.codes = codes.to(torch.int8)  # channels-last where the weight was

    def _round_bias(self) -> None:
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(round_together(self.bias, significant_bits(self.bits)))

    def _rounded(self) -> tuple[Tensor, Tensor]:
        """The codes, as floats, and the scale that the trained latents stand for.

        A thawed layer computes with them in evaluation mode, so that the score of an epoch is that of its frozen layer.
        """
        weight = self.get_parameter("weight").detach()
        scale = round_mantissa(self.scale.detach().abs().clamp_min(_SMALLEST), significant_bits(self.bits))
        return self.nearest(weight / self.steps(scale)), scale

    def nearest(self, places: Tensor) -> Tensor:
        """The codes, as floats, nearest to weights over their steps, any shape."""
        return sign(places) if self.bits == 1 else places.round().clamp(*span(self.bits, self.full))

    def _offset(self) -> Tensor | None:
        """The bias to compute with, `[out]`: rounded where the layer is thawed and evaluated."""
        if self.bias is None or self.codes is not None or self.training:
            return self.bias
        return round_together(self.bias.detach(), significant_bits(self.bits))

    def extra_repr(self) -> str:
        """Show the grid."""
        activations = f", {self.input_bits}-bit input" if self.input_grid else ""
        return f"bits={self.bits}, scales={self.scale.numel()}{activations}"


class QuantizedLinear(QuantizedLayer):
    """`nn.Linear` over integer codes `[out_features, in_features]`.

    With a `group` of 1 or more, each row has one scale for so many consecutive inputs: `scale [out_features, groups]`. `grid`
    are `full`, `input_bits`, `input_signs` and `gradient` of `QuantizedLayer`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = True,
        per_channel: bool = True,
        input_grid: bool = False,
        output_grid: bool = False,
        group: int = 0,
        **grid: Any,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bits=bits,
            bias=bias,
            per_channel=per_channel,
            input_grid=input_grid,
            output_grid=output_grid,
            **grid,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        if group:
            self.scale = torch.ones(out_features, -(-in_features // group))

    def rows(self, weight: Tensor) -> Tensor:
        """As of every kind; a last group that is shorter is filled with zeros, which cost a grid nothing."""
        if not self.group:
            return super().rows(weight)
        return F.pad(weight, (0, -self.in_features % self.group)).reshape(-1, self.group)

    def steps(self, scale: Tensor) -> Tensor:
        """As of every kind."""
        if not self.group:
            return super().steps(scale)
        return scale[:, :, None].expand(-1, -1, self.group).flatten(1)[:, : self.in_features]

    def rounded(self, input: Tensor) -> Tensor:
        """The input on its grid, any shape."""
        return self._on_grid(input, "input", self.input_bits)

    def operate(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Multiply `[..., in_features]` by the weight: `[..., out_features]`."""
        return F.linear(inputs, weight, self._offset())
