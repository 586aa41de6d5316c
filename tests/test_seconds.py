"""Operators timed alone, and their seconds in the tables; no test asserts a time, and most tables are written by hand."""

import copy

import onnx
import pytest
import torch
from torch import nn

from featherweight.allocation import EIGHTHS, measure_tables, solve, with_seconds
from featherweight.allocation.operators import operators_of
from featherweight.data import Data
from featherweight.errors import ExportError
from featherweight.latency_table import LatencyTable
from featherweight.portable import assemble, export_graph
from featherweight.preflight import find_clocked
from featherweight.running import run
from featherweight.runtimes import find_runtime, installed
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.technique import Context
from featherweight.techniques import QuantizeStatic

CLOCKED = [name for name in ("onnxruntime", "openvino") if installed(find_runtime(name))]


class Recurrent(nn.Module):
    """Two LSTM layers, an embedding before and a linear layer after."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.linear = nn.Embedding(9, 6), nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(self.lstm(self.embedding(x))[0][:, -1])


def images():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 8, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return model.eval(), torch.randn(1, 3, 8, 8)


def tokens():
    torch.manual_seed(0)
    return Recurrent().eval(), torch.randint(0, 9, (1, 7))


def context_of(example):
    batches = [(example.repeat(8, *[1] * (example.dim() - 1)), torch.zeros(8, dtype=torch.long))] * 2
    return Context(data=Data(example=example, calibrate=batches))


def exported(model, data):
    return assemble(export_graph(model, data), model.state_dict())


def static(model, context):
    return exported(run(QuantizeStatic(), copy.deepcopy(model), context).model, context.data)


@pytest.mark.parametrize("name", CLOCKED)
def test_a_runtime_times_its_operators(name):
    model, example = images()
    found = find_runtime(name).operators(exported(model, Data(example=example)), example, calls=3)
    assert len(found) >= 4
    assert all(seconds >= 0 for seconds in found.values())


def test_a_runtime_without_a_clock_says_so():
    model, example = images()
    with pytest.raises(ExportError, match="Eager does not time"):
        find_runtime("torch").operators(exported(model, Data(example=example)), example)


@pytest.mark.parametrize("name", ["torch", "onnxruntime_dynamic"])
def test_a_budget_is_kept_where_operators_are_timed(name):
    with pytest.raises(ExportError, match=f"'{name}' does not time single operators.*use onnxruntime, openvino"):
        find_clocked(name)
    assert find_clocked("onnxruntime") == "onnxruntime"


@pytest.mark.parametrize("integers", [False, True])
def test_an_operator_alone_is_what_the_model_runs(integers):
    model, example = images()
    context = context_of(example)
    whole = static(model, context) if integers else exported(model, context.data)
    found = operators_of(whole, example)
    assert list(found) == ["0", "2", "3", "6"]
    assert all(operator.integers == integers for operator in found.values())
    assert [operator.rounded for operator in found.values()] == [integers] * 3 + [False]
    shapes = {"0": (12, 3, 3, 3), "2": (12, 1, 3, 3), "3": (6, 12, 1, 1), "6": (5, 96)}
    wanted = {"0": (1, 12, 8, 8), "2": (1, 12, 4, 4), "3": (1, 6, 4, 4), "6": (1, 5)}
    for path, shape in shapes.items():
        graph, given = found[path].graph(shape)
        (output,) = Session(graph).run(given)
        assert output.shape == wanted[path]
        assert ("QLinearConv" in audit(graph)) == (integers and path != "6")
        assert ("QGemm" in audit(graph)) == (integers and path == "6")


def test_a_recurrent_layer_alone():
    model, example = tokens()
    found = operators_of(exported(model, Data(example=example)), example)
    assert list(found) == ["lstm", "lstm#2", "linear"]
    graph, given = found["lstm#2"].graph((4 * 5, 3))
    assert given.shape == (7, 1, 3)
    assert Session(graph).run(given)[0].shape == (7, 1, 1, 5)


def test_seconds_add_up_to_the_whole_model(tmp_path):
    """Of made-up seconds, all alike: the whole takes 1, and each of the operators 0.1 at every pair of shares."""
    model, example = images()
    context = context_of(example)
    tables = measure_tables(model, context, shares=EIGHTHS)
    assert [row.name for row in tables.rows] == ["0.weight", "2.weight", "3.weight", "6.weight"]
    whole, table = static(model, context), MadeUp({"0": 0.1})
    told = with_seconds(tables, model, context, whole, b"", table)
    assert sum(row.seconds[0][0] for row in told.rows) + told.fixed["seconds"] == pytest.approx(1.0)
    assert told.fixed["seconds"] == pytest.approx(0.6)
    first, depthwise, _, last = told.rows
    assert (len(first.seconds), len(first.seconds[0])) == (8, 1)
    assert (first.makes, depthwise.makes, last.reads) == (0, 0, 1)
    assert table.asked.pop()[0] == whole
    widths = [onnx.load_model_from_string(graph).graph.input[0].type.tensor_type.shape.dim for graph, _ in table.asked]
    assert sorted({dims[1].dim_value for dims in widths if len(dims) == 2}) == [16 * n for n in range(1, 9)]
    assert solve(told, {"seconds": 1.1}).costs["seconds"] == pytest.approx(1.0)
    assert type(tables).from_json(told.to_json()) == told


def test_more_than_the_whole_is_scaled_down():
    model, example = images()
    context = context_of(example)
    told = with_seconds(measure_tables(model, context), model, context, static(model, context), b"", MadeUp({"0": 2.0}))
    assert told.fixed["seconds"] == pytest.approx(0.0)
    assert sum(row.seconds[0][0] for row in told.rows) == pytest.approx(1.0)


def test_recurrent_layers_take_their_time_once_and_embeddings_none():
    model, example = tokens()
    context = context_of(example)
    told = with_seconds(measure_tables(model, context), model, context, static(model, context), b"", MadeUp({"0": 0.1}))
    dense = {row.name: row.seconds[0][0] for row in told.rows}
    assert dense.pop("embedding.weight") == 0
    assert {name for name, seconds in dense.items() if seconds == 0} == {"lstm.weight_hh_l0", "lstm.weight_hh_l1"}


@pytest.mark.parametrize("name", CLOCKED)
def test_tables_are_measured_once(name, tmp_path, monkeypatch):
    model, example = images()
    context = context_of(example)
    tables, whole = measure_tables(model, context), static(model, context)
    original = exported(model, context.data)
    first = with_seconds(tables, model, context, whole, original, LatencyTable(tmp_path / "t.json", name))
    monkeypatch.setattr("featherweight.latency_table.latencies", lambda *given, **named: pytest.fail("again"))
    monkeypatch.setattr("featherweight.latency_table.find_runtime", lambda name: pytest.fail("again"))
    again = with_seconds(tables, model, context, whole, original, LatencyTable(tmp_path / "t.json", name))
    assert again == first
    assert all(value >= 0 for row in first.rows for line in row.seconds for value in line)


class MadeUp:
    """A latency table whose operators all take the same, and whose whole model takes a second."""

    def __init__(self, each):
        (self.each,) = each.values()
        self.asked = []

    def operators(self, graphs, original, data, longest=1):
        self.asked += graphs.values()
        return dict.fromkeys(graphs, self.each * longest)

    def candidate(self, model, original, data):
        return 1.0
