"""Recurrent layers in exported graphs: any number of steps, one operator a layer, and the same numbers as PyTorch."""

import onnx
import pytest
import torch
from torch import nn

from featherweight import Context, Data, run
from featherweight.artifact import package
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.onnxruntime import Session
from featherweight.techniques import QuantizeWeights

SHAPES = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2}),
    (nn.GRU, {"bidirectional": True, "bias": False}),
    (nn.RNN, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False, "batch_first": False}),
]


class Layer(nn.Module):
    """A recurrent layer over steps of 5 features, from a state of its own or from zeros; all that it returns."""

    def __init__(self, cell, started=False, **options):
        super().__init__()
        self.cell = cell(5, 6, **{"batch_first": True, **options})
        self.started = started

    def forward(self, steps):
        if not self.started:
            return self.cell(steps)
        batch = steps.shape[0 if self.cell.batch_first else 1]
        count = self.cell.num_layers * (2 if self.cell.bidirectional else 1)
        state = torch.linspace(-1, 1, count * 6).reshape(count, 1, 6).expand(count, batch, 6)
        return self.cell(steps, (state, state / 2) if isinstance(self.cell, nn.LSTM) else state)


def drawn(*arguments, **options):
    torch.manual_seed(0)
    return Layer(*arguments, **options).eval()


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]


def agrees(model, graph, steps):
    for ours, theirs in zip(
        Session(assemble(graph, model.state_dict())).run((steps,)), flat(model(steps)), strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("started", [False, True], ids=["zeros", "started"])
@pytest.mark.parametrize(("cell", "options"), SHAPES)
def test_any_number_of_steps_where_their_dimension_is_named(cell, options, started):
    model = drawn(cell, started, **options)
    place = 1 if model.cell.batch_first else 0
    shape = (2, 7, 5) if place else (7, 2, 5)
    data = Data(
        example=torch.randn(shape), dynamic={"steps": {place: "time"}} if place else {"steps": {0: "time", 1: "rows"}}
    )
    graph = export_graph(model, data)
    agrees(model, graph, torch.randn((3, 11, 5) if place else (11, 3, 5)))
    agrees(model, graph, torch.randn((1, 2, 5) if place else (2, 1, 5)))


@pytest.mark.parametrize("options", [{}, {"nonlinearity": "relu", "num_layers": 3}, {"bidirectional": True}], ids=str)
def test_a_plain_layer_is_one_operator(options):
    model = drawn(nn.RNN, **options)
    graph = export_graph(model, Data(example=torch.randn(2, 7, 5)))
    nodes = [node.op_type for node in onnx.load_model_from_string(graph.skeleton).graph.node]
    assert nodes.count("RNN") == options.get("num_layers", 1)
    assert "Tanh" not in nodes
    agrees(model, graph, torch.randn(4, 7, 5))


def test_compressed_layers_take_any_number_of_steps():
    model, steps = drawn(nn.LSTM), torch.randn(2, 7, 5)
    data = Data(example=steps, dynamic={"steps": {1: "time"}})
    small, edits = run(QuantizeWeights(bits=4), model, Context(data=data))
    longer = torch.randn(2, 12, 5)
    made = package(small, edits, {}, export_graph(small, data)).run((longer,))
    torch.testing.assert_close(torch.from_numpy(made[0]), small(longer)[0], atol=1e-5, rtol=1e-4)
