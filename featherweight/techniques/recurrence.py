"""What enters each weight of a recurrent layer, step by step: the layer below, and the hidden state of the step before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

Recurrent = nn.LSTM | nn.GRU | nn.RNN


def recurrent_inputs(layer: Recurrent, steps: Tensor | PackedSequence, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each weight of the layer and what enters it, `[1, samples * steps, in]`, padding left out.

    Args:
        layer: any number of layers, directions and projections; dropout between layers is not applied.
        steps: what the layer is called on, batched or not, padded or packed.
        state: the initial state it is called with, or None.
    """
    ways = 2 if layer.bidirectional else 1
    values, valid = _time_first(layer, steps)
    hidden, cell = _initial(layer, state, values)
    for index in range(layer.num_layers):
        yield from ((f"weight_ih_l{index}{suffix}", values[valid][None]) for suffix in ("", "_reverse")[:ways])
        outputs = []
        for way, suffix in enumerate(("", "_reverse")[:ways]):
            place = f"l{index}{suffix}"
            start = hidden[index * ways + way], cell[index * ways + way]
            before, inner, output = _run(layer, place, values, valid, *start)
            yield f"weight_hh_{place}", before[valid][None]
            if f"weight_hr_{place}" in layer._parameters:
                yield f"weight_hr_{place}", inner[valid][None]
            outputs.append(output)
        values = torch.cat(outputs, -1)


def _time_first(layer: Recurrent, steps: Tensor | PackedSequence) -> tuple[Tensor, Tensor]:
    """Return the sequence as `[steps, samples, features]` and which steps are real, `[steps, samples]`."""
    if isinstance(steps, PackedSequence):
        values, lengths = pad_packed_sequence(steps)
        lengths = lengths.to(values.device)
        return values, torch.arange(len(values), device=values.device)[:, None] < lengths
    if steps.dim() == 2:
        steps = steps[None] if layer.batch_first else steps[:, None]
    values = steps.transpose(0, 1) if layer.batch_first else steps
    return values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)


def _initial(layer: Recurrent, state: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden and cell state, `[layers * directions, samples, width]`; layers without a cell get one of zeros."""
    count, samples = layer.num_layers * (2 if layer.bidirectional else 1), values.shape[1]
    cell = values.new_zeros(count, samples, layer.hidden_size)
    if state is None:
        return values.new_zeros(count, samples, layer.proj_size or layer.hidden_size), cell
    parts = [part if part.dim() == 3 else part[:, None] for part in (state if isinstance(state, tuple) else (state,))]
    return parts[0], parts[1] if len(parts) > 1 else cell


def _run(
    layer: Recurrent, place: str, values: Tensor, valid: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one direction; return, for each step, the state before it, the state unprojected, and its output."""
    parameters = layer._parameters
    before, inner, output = [], [], []
    incoming = nn.functional.linear(values, _of(parameters, "weight_ih", place), parameters.get(f"bias_ih_{place}"))
    order = range(len(values))
    for step in reversed(order) if place.endswith("_reverse") else order:
        before.append(hidden)
        outgoing = nn.functional.linear(hidden, _of(parameters, "weight_hh", place), parameters.get(f"bias_hh_{place}"))
        wide, new_cell = _cell(layer, incoming[step], outgoing, hidden, cell)
        inner.append(wide)
        projection = parameters.get(f"weight_hr_{place}")
        new = wide if projection is None else wide @ projection.T
        real = valid[step, :, None]
        hidden, cell = torch.where(real, new, hidden), torch.where(real, new_cell, cell)
        output.append(hidden * real)
    turn = -1 if place.endswith("_reverse") else 1
    return torch.stack(before[::turn]), torch.stack(inner[::turn]), torch.stack(output[::turn])


def _of(parameters: dict[str, Any], kind: str, place: str) -> Tensor:
    weight: Tensor = parameters[f"{kind}_{place}"]
    return weight


def _cell(layer: Recurrent, incoming: Tensor, outgoing: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden state before projection, and the next cell state, by PyTorch's order of gates."""
    if isinstance(layer, nn.LSTM):
        entry, forget, candidate, exit_ = (incoming + outgoing).chunk(4, -1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * candidate.tanh()
        return exit_.sigmoid() * cell.tanh(), cell
    if isinstance(layer, nn.GRU):
        reset_in, update_in, new_in = incoming.chunk(3, -1)
        reset_out, update_out, new_out = outgoing.chunk(3, -1)
        update = (update_in + update_out).sigmoid()
        candidate = (new_in + (reset_in + reset_out).sigmoid() * new_out).tanh()
        return candidate + update * (hidden - candidate), cell
    activation = torch.tanh if layer.nonlinearity == "tanh" else torch.relu
    return activation(incoming + outgoing), cell
