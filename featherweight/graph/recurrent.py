"""Rules for recurrent layers: a hidden unit is its rows in every gate, its column in the next step and in the next layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.graph.labels import FIXED, Call, Value, channels, unknown

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(call: Call) -> Any:
    """LSTM, GRU and RNN, with several layers, both directions and projections.

    The layers and directions of one module keep equal counts, but each its own units.
    """
    x, states, parameters = call.get("input"), call.get("hx"), call.get("params")
    if not isinstance(x, Value) or len(x.shape) != 3 or not all(p.static and p.layers for p in parameters):
        return unknown(call, "is recurrent")
    states = states if isinstance(states, (list, tuple)) else [states]
    count = call.get("num_layers") * (2 if call.get("bidirectional") else 1)
    each = len(parameters) // count
    projected = call.name == "lstm" and each == (5 if call.get("has_biases") else 3)
    line, others = channels(call, x, 2)
    call.free(others, range(3), "is recurrent")
    hidden, out = [], []
    for index in range(call.get("num_layers")):
        made = []
        for direction in range(count // call.get("num_layers")):
            place = index * (count // call.get("num_layers")) + direction
            inner, outer = _cell(call, line, parameters[each * place : each * (place + 1)], projected)
            hidden.append(inner)
            made.append(outer)
        out += made
        line = torch.cat(made)
    name = f"recurrent {call.where} {len(call.atoms.lines)}"
    for labels in hidden:
        call.atoms.line(name, labels)
    for labels in out if projected else ():
        call.atoms.line(f"{name} projected", labels)
    finals = [out, hidden] if call.name == "lstm" else [out]
    for state, lines in zip(states, finals, strict=False):
        _start(call, state, lines)
    stacked = [torch.stack(lines).unsqueeze(1) for lines in finals]
    return (
        Value(call.shapes[0], (line.reshape(1, 1, -1),)),
        *(Value(shape, (labels,), stacked=True) for shape, labels in zip(call.shapes[1:], stacked, strict=True)),
    )


def _cell(call: Call, line: Tensor, parameters: Sequence[Value], projected: bool) -> tuple[Tensor, Tensor]:
    """Tie one layer and direction; return the labels of its hidden units and of what it puts out."""
    why, gates = call.why(FIXED), GATES[call.name]
    inputs, states = parameters[0], parameters[1]
    call.atoms.tie(channels(call, inputs, 1)[0], line, why)
    rows = channels(call, inputs, 0)[0].reshape(gates, -1)
    unit = rows[0]
    call.atoms.tie(rows, unit, why)
    biases = parameters[2:-1] if projected else parameters[2:]
    for tensor in (states, *biases):
        call.atoms.tie(channels(call, tensor, 0)[0].reshape(gates, -1), unit, why)
    call.atoms.source(rows)
    out = unit
    if projected:
        out = channels(call, parameters[-1], 0)[0]
        call.atoms.tie(channels(call, parameters[-1], 1)[0], unit, why)
        call.atoms.source(out)
    call.atoms.tie(channels(call, states, 1)[0], out, why)
    return unit, out


def _start(call: Call, state: Any, lines: Sequence[Tensor]) -> None:
    """Tie a state that is given from outside; one of zeros is made to fit."""
    if isinstance(state, Value) and state.layers:
        for layer in state.layers:
            full = layer.expand(state.shape)
            if layer.shape[1] > 1:
                call.atoms.pin(layer, call.why("is recurrent"))
            for index, line in enumerate(lines):
                call.atoms.tie(full[index, 0], line, call.why(FIXED))
