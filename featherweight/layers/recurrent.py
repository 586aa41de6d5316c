"""LSTM, GRU and RNN over linear layers: every technique for linear layers reaches their matrices and biases.

What is stored and what is computed are separate: a runtime has one kernel for a recurrent layer, and it takes dense float
matrices, so the linear layers are read off before each forward and, in a file, once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.errors import ModelError
from featherweight.layers.quantized import QuantizedLayer


class Affine(NamedTuple):
    """What linear layers have made so far of the identity matrix and of zero: it passes through them and is never multiplied.

    A product with the identity would cost as much as many steps of the layer, and be counted as its work. Hooks on a linear
    layer find the identity here, or what the layer before made of it, as they would find any input.

    Attributes:
        rows: `[in, out]`, what became of each unit vector, before the offset.
        matrix: `[out, in]`, the same transposed; None before the first layer.
        offset: `[out]`, what became of zero, or None for zero.
    """

    rows: Tensor
    matrix: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Affine:
        """Take the place of the input of `F.linear`.

        Raises:
            ModelError: another operator was applied.
        """
        if function is not F.linear or not isinstance(args[0], Affine):
            raise ModelError(f"a recurrent layer reads its matrices off linear layers, and {function} is none")
        (_, matrix, offset), weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        # autocast would round a product, and recurrent kernels want one type
        matrix = weight if matrix is None else (weight @ matrix).to(weight.dtype)
        if offset is not None:
            moved = (weight @ offset).to(weight.dtype)
            bias = moved if bias is None else bias + moved
        return Affine(matrix.T, matrix, bias)


class SplitRecurrent(nn.RNNBase):
    """Mixed into a recurrent layer: its matrices and biases are those of linear layers, its forward is PyTorch's.

    Rows are gates times hidden units, in PyTorch's order of gates, so a scale a row is one for each gate and unit.

    Attributes:
        incoming: `weight_ih` and `bias_ih`, one linear layer for each layer and, within it, direction.
        hidden: `weight_hh` and `bias_hh`, the same; two layers in a row where the matrix is stored as factors.
        projection: `weight_hr` of an LSTM with projections; none otherwise.
    """

    def split(self, rank: int = 0) -> None:
        """Put linear layers in the place of the parameters.

        Args:
            rank: of the hidden matrices, stored as two factors; 0 leaves them whole.
        """
        ways = 2 if self.bidirectional else 1
        gates, outputs = len(self.get_parameter("weight_hh_l0")), self.proj_size or self.hidden_size
        self._parameters.clear()
        incoming, hidden, projection = list[nn.Module](), list[nn.Module](), list[nn.Module]()
        for place in range(self.num_layers * ways):
            width = self.input_size if place < ways else outputs * ways
            incoming.append(nn.Linear(width, gates, bias=self.bias))
            whole = nn.Linear(rank or outputs, gates, bias=self.bias)
            hidden.append(nn.Sequential(nn.Linear(outputs, rank, bias=False), whole) if rank else whole)
            if self.proj_size:
                projection.append(nn.Linear(self.hidden_size, self.proj_size, bias=False))
        self.incoming, self.hidden = nn.ModuleList(incoming), nn.ModuleList(hidden)
        self.projection = nn.ModuleList(projection)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """What PyTorch's forward computes with, in the order of `_flat_weights_names`."""
        if "projection" not in self._modules:  # PyTorch is still building the layer that is to be split
            return [self._parameters[name] for name in self._flat_weights_names]
        ways, outputs = 2 if self.bidirectional else 1, self.proj_size or self.hidden_size
        flat: list[Tensor | None] = []
        for place, (incoming, hidden) in enumerate(zip(self.incoming, self.hidden, strict=True)):
            entering = read(incoming, self.input_size if place < ways else outputs * ways)
            staying = read(hidden, outputs)
            flat += [entering.matrix, staying.matrix]
            if self.bias:
                flat += [entering.offset, staying.offset]
            if self.proj_size:
                flat.append(read(self.projection[place], self.hidden_size).matrix)
        return flat

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        """Take nothing: the list is made anew at each forward."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As PyTorch's layer, on an input that is rounded where the first of the incoming layers has a grid for it."""
        first = self.incoming[0]
        if isinstance(first, QuantizedLayer) and first.input_grid:
            input = on(first.rounded, input)
        return super().forward(input, hx)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no list whose memory could be made one piece."""


class SplitLSTM(SplitRecurrent, nn.LSTM):
    """An `nn.LSTM` over linear layers; what it is called with and what it returns are the same."""


class SplitGRU(SplitRecurrent, nn.GRU):
    """An `nn.GRU` over linear layers; what it is called with and what it returns are the same."""


class SplitRNN(SplitRecurrent, nn.RNN):
    """An `nn.RNN` over linear layers; what it is called with and what it returns are the same."""


_CELLS: dict[str, Callable[..., SplitRecurrent]] = {
    "lstm": SplitLSTM,
    "gru": SplitGRU,
    "rnn_tanh": SplitRNN,
    "rnn_relu": partial(SplitRNN, nonlinearity="relu"),
}


def recurrent(
    cell: str,
    input_size: int,
    hidden_size: int,
    layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    proj_size: int = 0,
) -> nn.Module:
    """Return a recurrent layer over linear layers.

    Args:
        cell: `lstm`, `gru`, `rnn_tanh` or `rnn_relu`.
        input_size: features of a step.
        hidden_size: hidden units of each direction.
        layers: 1 or more.
        bias: as of `nn.LSTM`.
        batch_first: as of `nn.LSTM`.
        dropout: between layers while training, 0 to 1.
        bidirectional: as of `nn.LSTM`.
        proj_size: width that the hidden state of an LSTM is projected to; 0 for none.

    Raises:
        KeyError: there is no such cell.
        ValueError: a size or the dropout makes no sense.
    """
    shape: dict[str, Any] = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    shape |= {"proj_size": proj_size} if proj_size else {}
    layer = _CELLS[cell](input_size, hidden_size, batch_first=batch_first, dropout=dropout, **shape)
    layer.split()
    return layer


def on(function: Callable[[Tensor], Tensor], steps: Tensor | PackedSequence) -> Any:
    """Return what a function of features makes of steps, packed or not."""
    return steps._replace(data=function(steps.data)) if isinstance(steps, PackedSequence) else function(steps)


def read(layer: nn.Module, width: int) -> Affine:
    """Return the matrix and the offset of linear layers that take `width` inputs; the layers are called, so hooks see it."""
    like = next(value for value in (*layer.parameters(), *layer.buffers()) if value.is_floating_point())
    made: Affine = layer(Affine(torch.eye(width, dtype=like.dtype, device=like.device)))
    return made
