"""Static int8: grids that hold zero, output grids where they are wanted, and integers in ONNX Runtime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data
from featherweight.edits import apply
from featherweight.layers import QuantizedLayer
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, QuantizeStatic
from featherweight.techniques.observe import observe
from featherweight.techniques.recurrent import recurrent_swap
from featherweight.zoo import small_models


def quantize(task, *before, **settings):
    context = Context(data=task.data)
    output, _ = run(Recipe((*before, QuantizeStatic(**settings))), task.model, context)
    return output, context


def signal_to_noise(wanted, given):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - given).square().sum()))


def test_observation_sees_ranges_and_leaves_no_hook():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).train()
    model[0].weight.data.fill_(2.0)
    data = Data(
        example=torch.ones(1, 1),
        calibrate=[torch.tensor([[1.0], [-3.0]]), torch.tensor([[5.0], [0.0]]), torch.full((1, 1), 99.0)],
    )
    entered, left, outputs = observe(model, Context(data=data), ["0"], 2, {"0"}, 1)
    assert (entered["0"].low, entered["0"].high) == (-3.0, 5.0)
    assert (left["0"].low, left["0"].high) == (-6.0, 10.0)
    assert [output.flatten().tolist() for output in outputs] == [[2.0, -6.0]]
    assert observe(model, Context(data=data), ["0"], 2)[1:] == ({}, [])
    assert not model[0]._forward_hooks
    assert model.training


def test_a_clip_needs_no_grid_in_front_of_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.Hardtanh(), nn.Conv2d(4, 2, 3)
        ).eval()
        inputs = 20 * torch.randn(8, 3, 9, 9)
    data = Data(example=inputs[:1], calibrate=[inputs], loss="mse")
    output, _ = run(QuantizeStatic(), model, Context(data=data))
    assert [output[place].output_grid for place in (0, 2, 4)] == [False] * 3
    with torch.no_grad():
        gap, size = (output(inputs) - model(inputs)).square().sum(), model(inputs).square().sum()
    assert gap < 1e-3 * size


class Pooled(nn.Module):
    """A maximum that a layer and a sum read, and one that a mean reads too."""

    def __init__(self):
        super().__init__()
        self.stem, self.inside = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.other, self.last = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(F.relu(self.other(x + self.inside(x))), 2)
        return self.last(x) + x.mean()


def test_a_maximum_needs_no_grid_in_front_of_it_where_layers_round_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Pooled().eval(), torch.randn(8, 3, 18, 18)
    data = Data(example=inputs[:1], calibrate=[inputs], loss="mse")
    output, _ = run(QuantizeStatic(), model, Context(data=data))
    assert {path for path, layer in output.named_children() if layer.output_grid} == {"inside", "other", "last"}
    graph = assemble(export_graph(output, data), output.state_dict())
    assert audit(graph)["QLinearConv"] == 4
    with torch.no_grad():
        assert signal_to_noise(output(inputs), torch.from_numpy(Session(graph).run(inputs)[0])) > 35


def test_output_grids_only_where_needed():
    task = small_models()["residual"]
    output, _ = quantize(task, FoldBatchNorm())
    grids = {path: layer.output_grid for path, layer in output.named_modules() if isinstance(layer, QuantizedLayer)}
    assert all(layer.input_grid for layer in output.modules() if isinstance(layer, QuantizedLayer))
    # conv1 feeds conv2 through ReLU alone; the others feed an addition; the classifier is the output
    assert grids == {
        "stem": True,
        "first.conv1": False,
        "first.conv2": True,
        "second.conv1": False,
        "second.conv2": True,
        "projection": True,
        "classifier": False,
    }


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "perceptron", "twice", "transformer", "recurrent"])
def test_agrees_with_float_in_pytorch_and_in_onnx_runtime(name):
    task = small_models()[name]
    output, _ = quantize(task, FoldBatchNorm(), range="minmax")
    inputs = task.data.calibrate[0][0]
    with torch.no_grad():
        wanted, given = task.model(inputs), output(inputs)
    assert signal_to_noise(wanted, given) > 20
    graph = assemble(export_graph(output, task.data), output.state_dict())
    ran = torch.from_numpy(Session(graph).run(inputs)[0])
    assert signal_to_noise(wanted, ran) > 20
    assert signal_to_noise(given, ran) > 25


@pytest.mark.parametrize(("name", "integer"), [("plain", 2), ("residual", 6), ("branches", 5)])
def test_onnx_runtime_convolves_integers(name, integer):
    task = small_models()[name]
    output, _ = quantize(task, FoldBatchNorm())
    seen = audit(assemble(export_graph(output, task.data), output.state_dict()))
    assert seen.get("QLinearConv", 0) >= integer - 1, seen
    assert seen.get("Conv", 0) + seen.get("FusedConv", 0) <= 1, seen


def test_weights_of_fewer_bits():
    task = small_models()["plain"]
    output, _ = quantize(task, weight_bits=4)
    assert int(output.hidden.codes.abs().max()) == 7


def test_biases_take_what_rounding_changes_in_the_mean():
    """Of two groups of one output each, with two taps: lost weight times the mean of the channel that it meets, by hand."""
    layer = nn.Conv1d(2, 2, 2, groups=2)
    layer.weight.data = torch.tensor([[[1.0, 0.4]], [[-1.0, 0.3]]])
    layer.bias.data = torch.tensor([0.5, 0.0])
    inputs = torch.tensor([[[1.0, 3.0], [6.0, 4.0]]])  # means 2 and 5
    context = Context(data=Data(example=inputs, calibrate=[inputs]))
    output, _ = run(QuantizeStatic(weight_bits=2, tolerance=0.0), nn.Sequential(layer).eval(), context)
    lost = layer.weight.detach() - output[0].dequantized()
    assert float(lost.abs().max()) > 0.2
    wanted = layer.bias.detach() + lost.sum((1, 2)) * torch.tensor([2.0, 5.0])
    assert output[0].bias.tolist() == pytest.approx(wanted.tolist(), abs=0.02)  # but for the bits it is stored with


def test_a_layer_that_calibration_never_reaches_is_left():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    context = Context(data=Data(example=torch.ones(1, 4), calibrate=[torch.ones(2, 4)]))
    output, edits = run(QuantizeStatic(), Skips().eval(), context)
    assert [edit.path for edit in edits] == ["used"]
    assert [(u.path, u.reason) for u in context.untouched] == [("unused", "calibration data never reached it")]
    assert type(output.unused) is nn.Linear


def test_a_layer_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(input=x)

    context = Context(data=Data(example=torch.ones(1, 4), calibrate=[torch.ones(2, 4)]))
    _, edits = run(QuantizeStatic(), Keyword().eval(), context)
    assert [edit.path for edit in edits] == ["fc"]


def test_layers_without_integer_activations_get_integer_weights_and_are_listed():
    """Whole, and where an earlier step has taken them apart into linear layers."""
    inputs = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(12, 12, batch_first=True)
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(3, 3, 2)
            self.head = nn.Linear(13, 4)

        def forward(self, x):
            steps, _ = self.gru(x)
            return self.head(self.up(self.attention(steps, steps, steps)[0]))

    data = Data(example=inputs[:1], calibrate=[inputs])
    apart = Mixed().eval()
    apply(apart, recurrent_swap("gru", apart.gru))
    for model in (Mixed().eval(), apart):
        context = Context(data=data)
        output, _ = run(QuantizeStatic(), model, context)
        grids = {path: layer.input_grid for path, layer in output.named_modules() if isinstance(layer, QuantizedLayer)}
        parts = dict.fromkeys((f"attention.{part}" for part in ("query", "key", "value", "out")), True)
        assert grids == {"gru.incoming.0": False, "gru.hidden.0": False, **parts, "up": False, "head": True}
        assert {u.path for u in context.untouched} == {"gru", "up"}
        assert {"integer weights alone" in u.reason for u in context.untouched} == {True}
