"""LSTM and GRU with matrices of low rank: each layer reads fewer inputs, and may store its hidden matrix as two factors.

What is stored and what is computed are separate: PyTorch has one kernel for a recurrent layer, and it takes a dense hidden
matrix, so factors are multiplied first. In a file they are a loop over the steps where that is faster (`recurrent_loop.py`), and
else multiplied once, when the model is loaded. Narrower inputs are multiplied for all steps at once, in front, and save time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.layers.recurrent import SplitGRU, SplitLSTM, SplitRecurrent, on
from featherweight.layers.recurrent_loop import loop, pays


class FactoredRecurrent(nn.Module):
    """An `nn.LSTM` or `nn.GRU` as single layers, each behind a linear one to fewer inputs; calls and results are the same.

    Attributes:
        projections: one for each layer, `nn.Linear(inputs, rank)` without bias, or an identity.
        layers: one for each layer, both directions together.
        loops: first place and the place after the last of each loop over the steps that the forward has, in order.
    """

    loops: tuple[tuple[int, int], ...] = ()

    cells: tuple[type[nn.LSTM] | type[nn.GRU], type[SplitRecurrent]]
    """The class of a layer, and the one with a factored hidden matrix."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        input_ranks: Sequence[int],
        hidden_ranks: Sequence[int],
        shared: bool = False,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        """Build fresh layers.

        Args:
            input_size: features of a step.
            hidden_size: hidden units of each direction.
            input_ranks: one for each layer; 0 leaves its input matrix dense.
            hidden_ranks: one for each layer; 0 leaves its hidden matrix dense.
            shared: whether the first factor of a hidden matrix is the projection in front of the next layer too, where both
                have the same rank; one direction only.
            bias: as of `nn.LSTM`.
            batch_first: as of `nn.LSTM`.
            dropout: between layers while training, 0 to 1.
            bidirectional: as of `nn.LSTM`.

        Raises:
            ValueError: the ranks are not one for each layer, or two directions are to share.
        """
        super().__init__()
        if len(input_ranks) != len(hidden_ranks) or (shared and bidirectional):
            raise ValueError("there is one input rank and one hidden rank a layer, and only one direction can share")
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.projections, self.layers = nn.ModuleList(), nn.ModuleList()
        width = input_size
        for inner, outer in zip(input_ranks, hidden_ranks, strict=True):
            self.projections.append(nn.Linear(width, inner, bias=False) if inner else nn.Identity())
            dense, factored = self.cells
            options: dict[str, Any] = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
            layer = (factored if outer else dense)(inner or width, hidden_size, **options)  # type: ignore[arg-type]
            if isinstance(layer, SplitRecurrent):
                layer.split(outer)
            self.layers.append(layer)
            width = hidden_size * (2 if bidirectional else 1)
        for place, outer in enumerate(hidden_ranks[:-1] if shared else ()):
            if outer and outer == input_ranks[place + 1]:
                self.projections[place + 1] = self.layers[place].get_submodule("hidden.0.0")

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Any]:
        """Run all layers; arguments and results are named and shaped as those of `nn.LSTM` or `nn.GRU`.

        Args:
            input: `[steps, batch, features]`, `[batch, steps, features]` when `batch_first`, without a batch, or packed.
            hx: the initial state, `[layers * directions, batch, hidden]`, two of them for an LSTM; zeros when None.
        """
        ways = 2 if self.bidirectional else 1
        values, finals = input, []
        for first, after, compute in self._runs(isinstance(input, PackedSequence)):
            start = None if hx is None else _each(lambda state, at=slice(first * ways, after * ways): state[at], hx)
            if first and self.training and self.dropout:
                values = on(lambda steps: F.dropout(steps, self.dropout), values)
            values, final = compute(on(self.projections[first], values), start)
            finals.append(final)
        if isinstance(finals[0], tuple):
            return values, tuple(torch.cat(states) for states in zip(*finals, strict=True))
        return values, torch.cat(finals)

    def faster_loops(self) -> tuple[tuple[int, int], ...]:
        """Return the loops over the steps with which a runtime is faster, as `loops` has them."""
        loops: list[tuple[int, int]] = []
        for place in (place for place, layer in enumerate(self.layers) if pays(layer)):
            # a loop goes on into a layer that reads what it carries anyway
            below = self.layers[place - 1] if loops and loops[-1][1] == place else None
            goes_on = below is not None and self.projections[place] is below.get_submodule("hidden.0.0")
            loops[-1:] = [(loops[-1][0], place + 1)] if goes_on else [*loops[-1:], (place, place + 1)]
        return tuple(loops)

    def _runs(self, packed: bool) -> Iterator[tuple[int, int, Callable[..., Any]]]:
        """Yield the first place of layers that are computed together, the place after them, and what computes them."""
        ends, place = dict(() if packed else self.loops), 0
        while place < len(self.layers):
            first, place = place, ends.get(place, place + 1)
            together = [cast(SplitRecurrent, layer) for layer in self.layers[first:place]]
            yield first, place, partial(loop, together) if first in ends else together[0]


class FactoredLSTM(FactoredRecurrent):
    """An `nn.LSTM` with matrices of low rank."""

    cells = (nn.LSTM, SplitLSTM)


class FactoredGRU(FactoredRecurrent):
    """An `nn.GRU` with matrices of low rank."""

    cells = (nn.GRU, SplitGRU)


@contextmanager
def looping(model: nn.Module) -> Iterator[None]:
    """Run a block with the model's factored layers as loops over the steps where a runtime is faster with them."""
    found = [module for module in model.modules() if isinstance(module, FactoredRecurrent)]
    try:
        for module in found:
            module.loops = module.faster_loops()
        yield
    finally:
        for module in found:
            module.loops = ()


def _each(function: Any, state: Any) -> Any:
    """Apply a function to the hidden state, or to hidden and cell state."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
