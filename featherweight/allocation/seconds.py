"""Seconds in the tables: of each operator on a runtime, at every pair of shares of its outputs and inputs kept.

Kernels work on blocks of channels, so that time falls in steps with the width, and at some widths rises. Operators are timed
alone, by the runtime's own clock, and scaled to what the layers take inside the model; what it takes beyond them is fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from featherweight.allocation.operators import Array, Operator, operators_of
from featherweight.allocation.treatments import Group, Row, Tables
from featherweight.data import example_inputs
from featherweight.edits import module_at
from featherweight.graph import CoupledGroup
from featherweight.latency_table import LatencyTable
from featherweight.technique import Context
from featherweight.techniques.cuts import clusters

_RECURRENT = "weight_ih_l"
Place = tuple[int, int, int]  # which row, share of outputs and share of inputs


def with_seconds(
    tables: Tables, model: nn.Module, context: Context, whole: bytes, original: bytes, table: LatencyTable
) -> Tables:
    """Return tables whose rows and fixed costs have seconds.

    Args:
        tables: of the model.
        model: prepared; it comes back as it was.
        context: example and scope, as the tables were made with.
        whole: the model in the form that is shipped, nothing cut: serialized ONNX.
        original: what a latency is relative to: serialized ONNX.
        table: what is measured goes there, and what is there is not measured again.
    """
    inputs, found = example_inputs(context.data, batch=1), clusters(model, context)
    operators = operators_of(whole, inputs)
    graphs: dict[Place, tuple[bytes, Array]] = {}
    for place, row in enumerate(tables.rows):
        operator = _operator(model, row, operators)
        if operator is not None:
            for pair in _pairs(row, tables.groups):
                graphs[place, *pair] = operator.graph(_shape(row, found, tables.groups, pair))
    took = table.operators({str(place): graph for place, graph in graphs.items()}, original, context.data)
    seconds = {place: took[str(place)] for place in graphs}
    dense, layers = table.candidate(whole, original, context.data), 0.0
    if timed := len({place for place, _, _ in graphs}):  # layers are what takes longest in a model
        layers = table.operators({"whole": (whole, inputs)}, original, context.data, timed)["whole"]
    return _filled(tables, model, seconds, dense, min(dense, layers))


def _filled(tables: Tables, model: nn.Module, seconds: Mapping[Place, float], dense: float, layers: float) -> Tables:
    """Tables with these seconds, in proportion to what the layers take in the whole model.

    Rows that have none take theirs by multiply-adds, and all together never more than the whole model.
    """
    plain = [row.treatments[0].macs for row in tables.rows]
    timed = {place for place, _, _ in seconds}
    alone = sum(seconds[place, 0, 0] for place in timed)
    if alone > 0:
        seconds = {place: value * layers / alone for place, value in seconds.items()}
        rate = layers / max(1.0, sum(plain[place] for place in timed))
    else:
        rate = dense / max(1.0, sum(plain) + tables.fixed.get("macs", 0.0))
    rows, total = [], 0.0
    for place, row in enumerate(tables.rows):
        making, reading = (_shares(tables.groups, at) for at in (row.makes, row.reads))
        own = 0.0 if _costless(model, row) else rate * plain[place]
        told = tuple(
            tuple(seconds.get((place, made, read), own * out * inside) for read, inside in enumerate(reading))
            for made, out in enumerate(making)
        )
        rows.append(replace(row, seconds=told))
        total += told[0][0]
    scale = min(1.0, dense / total) if total > 0 else 1.0
    scaled = (replace(row, seconds=tuple(tuple(scale * one for one in line) for line in row.seconds)) for row in rows)
    return replace(tables, rows=tuple(scaled), fixed={**tables.fixed, "seconds": dense - scale * total})


def _operator(model: nn.Module, row: Row, operators: Mapping[str, Operator]) -> Operator | None:
    """The operator that a weight is timed with: a recurrent layer's with the weights of its inputs, one direction for both."""
    name = row.name.rpartition(".")[2]
    if isinstance(module_at(model, row.path), nn.RNNBase):
        layer = name.removeprefix(_RECURRENT)
        if not layer.isdigit():
            return None
        return operators.get(row.path if layer == "0" else f"{row.path}#{int(layer) + 1}")
    return operators.get(row.path or "model") if name == "weight" else None


def _costless(model: nn.Module, row: Row) -> bool:
    """Whether a weight takes no time of its own: looked up, or counted with the inputs of its recurrent layer."""
    layer = module_at(model, row.path)
    if isinstance(layer, nn.RNNBase):
        return not row.name.rpartition(".")[2].removeprefix(_RECURRENT).isdigit()
    return isinstance(layer, nn.Embedding)


def _shares(groups: Sequence[Group], at: int) -> tuple[float, ...]:
    return groups[at].shares if at >= 0 else (1.0,)


def _pairs(row: Row, groups: Sequence[Group]) -> Iterator[tuple[int, int]]:
    """Every place among the shares of outputs and of inputs."""
    return itertools.product(range(len(_shares(groups, row.makes))), range(len(_shares(groups, row.reads))))


def _shape(
    row: Row, found: Sequence[Sequence[CoupledGroup]], groups: Sequence[Group], places: tuple[int, int]
) -> tuple[int, ...]:
    """The weight's shape at some shares, as a cut to them leaves it."""
    shape = list(row.shape)
    for dim, (at, place) in enumerate(zip((row.makes, row.reads), places, strict=True)):
        for group in found[at] if at >= 0 else ():
            if (row.name, dim) in group.members:
                owned = len(group.units[0][group.members.index((row.name, dim))])
                kept = max(1, round(groups[at].shares[place] * len(group)))
                shape[dim] -= owned * (len(group) - kept)
    return tuple(shape)
