"""LSTM, GRU and RNN cells over two linear layers: every technique for linear layers reaches their matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


class RecurrentCell(nn.Module):
    """`nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` as two linear layers; what it is called with and what it returns are the same.

    Rows are gates times hidden units, in PyTorch's order of gates.

    Args:
        cell: `lstm`, `gru`, `tanh` or `relu`.
        input_size: features of a step, 1 or more.
        hidden_size: hidden units, 1 or more.
        bias: of both layers.

    Raises:
        KeyError: there is no such cell.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.cell = cell
        self.incoming = nn.Linear(input_size, GATES[cell] * hidden_size, bias=bias)
        self.hidden = nn.Linear(hidden_size, GATES[cell] * hidden_size, bias=bias)

    @property
    def input_size(self) -> int:
        """Features of a step, as many as are left."""
        return _width(self.incoming)

    @property
    def hidden_size(self) -> int:
        """Hidden units, as many as are left."""
        return _width(self.hidden)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the next state `[batch, hidden]`, or hidden and cell state of an LSTM; without a batch where the input has none.

        Args:
            input: `[batch, features]` or `[features]`.
            hx: the state, shaped like what is returned; zeros when None.
        """
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.cell == "lstm" else zeros
        state: Tensor = hx[0] if self.cell == "lstm" else hx
        entering, staying = self.incoming(input), self.hidden(state)
        if self.cell == "lstm":
            entry, forget, candidate, leave = (entering + staying).chunk(4, -1)
            memory = forget.sigmoid() * hx[1] + entry.sigmoid() * candidate.tanh()
            return leave.sigmoid() * memory.tanh(), memory
        if self.cell == "gru":
            (reset_in, update_in, new_in), (reset, update, new) = entering.chunk(3, -1), staying.chunk(3, -1)
            candidate = (new_in + (reset_in + reset).sigmoid() * new).tanh()
            return candidate + (update_in + update).sigmoid() * (state - candidate)
        function: Callable[[Tensor], Tensor] = torch.tanh if self.cell == "tanh" else torch.relu
        return function(entering + staying)


def _width(layer: nn.Module) -> int:
    """The inputs of a linear layer, whatever was put in its place."""
    first = next(module for module in layer.modules() if hasattr(module, "in_features"))
    return int(first.in_features)  # type: ignore[arg-type]
