"""Recurrent layers with factored hidden matrices as one loop over the steps: what is carried is as wide as the factors' rank.

A runtime's kernel for recurrent layers multiplies a dense hidden matrix at each step, and at one sample spends its time on reading
it. A loop of plain operators reads the two factors instead, but costs some time for each operator, so it pays above a size only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from featherweight.layers.recurrent import SplitLSTM, SplitRecurrent, read

_OVERHEAD = 130_000
"""Weights of a kernel's matrix that are read in the time that the operators of one step take beside the factors.

ONNX Runtime 1.31, one thread of an AMD EPYC, batch 1, 96 to 512 units and ranks of a sixteenth to a half of them: every loop that
reads this many weights fewer a step is faster than the kernel, by 0.5 us a step for an LSTM of 256 units and rank 100, or a GRU of
256 and rank 64, and by 5.7 and 1.9 us at rank 16. Loops of 192 units are not. On OpenVINO loops pay somewhat earlier.
"""


def pays(layer: nn.Module) -> bool:
    """Whether a loop over a layer's factors takes less time than a kernel with their product, judged by their sizes.

    Args:
        layer: recurrent, of one layer.
    """
    if not isinstance(layer, SplitRecurrent) or layer.bidirectional or not isinstance(layer.hidden[0], nn.Sequential):
        return False
    cell = _Cell(layer)
    return len(cell.first) * cell.second.shape[1] - cell.first.numel() - cell.second.numel() > _OVERHEAD


def loop(layers: Sequence[SplitRecurrent], input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """Compute layers on top of each other in one loop; arguments and results are those of one `nn.LSTM` or `nn.GRU`.

    Args:
        layers: all LSTMs or all GRUs, of one layer, one direction and a factored hidden matrix; each but the first reads the
            state of the layer below times the first factor of that layer's hidden matrix.
        input: `[steps, batch, features]`, `[batch, steps, features]` when `batch_first`, or without a batch.
        hx: the initial state, `[layers, batch, hidden]`, two of them for an LSTM; zeros when None.
    """
    alone = input.dim() == 2
    turned = layers[0].batch_first and not alone
    steps = input[:, None] if alone else input.transpose(0, 1) if turned else input
    cells = [(_LSTM if isinstance(layer, SplitLSTM) else _GRU)(layer) for layer in layers]
    if hx is None:
        given = (steps.new_zeros(len(cells), steps.shape[1], layers[0].hidden_size),) * cells[0].states
    else:
        given = tuple(state[:, None] if alone else state for state in (hx if isinstance(hx, tuple) else (hx,)))
    # a loop may not be given the same memory twice
    starts = [[state[place].clone() for state in given] for place in range(len(cells))]

    def step(carried: list[list[Tensor]], entering: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
        after: list[list[Tensor]] = []
        outputs: list[Tensor] = []
        for place, (cell, before) in enumerate(zip(cells, carried, strict=True)):
            own, output = cell.step(cell.enter(after[-1][0]) if place else entering, *before)
            after.append(own)
            outputs.append(output)
        return after, outputs

    start = [cell.start(*state) for cell, state in zip(cells, starts, strict=True)]
    last, stacked = scan(step, start, cells[0].enter(steps))
    outputs = [output.flatten(0, -3) for output in stacked]
    finals = [torch.stack([output[-1] for output in outputs])]
    if cells[0].states == 2:
        finals.append(torch.stack([cell for _, cell in last]))
    values = outputs[-1]
    if alone:
        values, finals = values[:, 0], [state[:, 0] for state in finals]
    elif turned:
        values = values.transpose(0, 1)
    return values, tuple(finals) if len(finals) == 2 else finals[0]


class _Cell:
    """The matrices of a layer, as its steps multiply them.

    Attributes:
        states: how many the layer has.
    """

    states: int

    def __init__(self, layer: SplitRecurrent) -> None:
        first, second = layer.get_submodule("hidden.0.0"), layer.get_submodule("hidden.0.1")
        self.first = read(first, layer.hidden_size).rows
        self.second, _, self.hidden_bias = read(second, self.first.shape[1])
        self.entering, _, self.entering_bias = read(layer.incoming[0], layer.input_size)


class _LSTM(_Cell):
    """Gates in PyTorch's order; carried are the hidden state times the first factor, and the cell state."""

    states = 2

    def __init__(self, layer: SplitRecurrent) -> None:
        super().__init__(layer)
        if self.entering_bias is not None and self.hidden_bias is not None:
            self.entering_bias = self.entering_bias + self.hidden_bias  # once, and not in every step

    def enter(self, inputs: Tensor) -> Tensor:
        """Return what inputs `[..., features]` and both biases add to the gates."""
        return _affine(inputs, self.entering, self.entering_bias)

    def start(self, hidden: Tensor, cell: Tensor) -> list[Tensor]:
        """Return what is carried into the first step."""
        return [hidden @ self.first, cell]

    def step(self, entering: Tensor, narrow: Tensor, cell: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what is carried on, and the hidden state."""
        entry, forget, candidate, exit_ = torch.addmm(entering, narrow, self.second).chunk(4, -1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
        hidden = exit_.sigmoid() * cell.tanh()
        return [hidden @ self.first, cell], hidden


class _GRU(_Cell):
    """Gates in PyTorch's order; carried are the hidden state times the first factor, and the hidden state."""

    states = 1

    def enter(self, inputs: Tensor) -> Tensor:
        """Return what inputs `[..., features]` add to the gates."""
        return _affine(inputs, self.entering, self.entering_bias)

    def start(self, hidden: Tensor) -> list[Tensor]:
        """Return what is carried into the first step."""
        return [hidden @ self.first, hidden]

    def step(self, entering: Tensor, narrow: Tensor, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return what is carried on, and the hidden state."""
        reset_in, update_in, new_in = entering.chunk(3, -1)
        reset_out, update_out, new_out = _affine(narrow, self.second, self.hidden_bias).chunk(3, -1)
        candidate = (new_in + (reset_in + reset_out).sigmoid() * new_out).tanh()
        hidden = candidate + (update_in + update_out).sigmoid() * (hidden - candidate)
        return [hidden @ self.first, hidden], hidden.clone()[None]  # a loop may not give one value twice


def _affine(inputs: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs `[..., in]` times `[in, out]`; `addmm` is one operator of a runtime, a product and a sum are two."""
    if bias is None or inputs.dim() > 2:
        return inputs @ rows if bias is None else inputs @ rows + bias
    return torch.addmm(bias, inputs, rows)
