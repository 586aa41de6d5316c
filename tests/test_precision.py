"""A layer whose integer form is slower stays float: graphs with layers taken back, and the choice by times that are made up."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight.precision
from featherweight import Context, Data, run
from featherweight.agreement import compare, expected_outputs
from featherweight.delivery import deliveries, subject, timed
from featherweight.float_graph import alike, floated
from featherweight.integer_graph import layers
from featherweight.precision import settled
from featherweight.runtimes import Subject
from featherweight.runtimes.onnxruntime import Session, audit
from featherweight.techniques import QuantizeStatic

LAYERS = ("stem", "first", "second", "linear")


class Residual(nn.Module):
    """A stem, a residual block whose convolutions are alike, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.linear = nn.Linear(16, 5)

    def forward(self, image):
        x = F.relu(self.stem(image))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def made():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = Residual().eval(), [torch.randn(8, 3, 12, 12) for _ in range(2)]
    data = Data(example=batches[0][:1], calibrate=[(batch, batch) for batch in batches], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    return small, subject(small, data), batches[0], expected_outputs(small, batches[0])


def operators(model):
    return {node.op_type for node in onnx.load_model_from_string(model).graph.node}


def test_a_whole_model_taken_back_to_floats_has_no_grids_and_grows_by_nothing(made):
    _, whole, batch, expected = made
    model = floated(whole.onnx, LAYERS)
    assert not operators(model) & {"QuantizeLinear", "DequantizeLinear"}
    assert layers(onnx.load_model_from_string(model)) == dict.fromkeys(LAYERS, False)
    assert len(model) < len(whole.onnx) * 1.02
    assert not any("Q" in name or "Quantize" in name for name in audit(model))
    assert compare(expected, Session(model).run(batch)).sqnr_db > 30


def test_one_layer_taken_back_leaves_the_others_integer(made):
    _, whole, batch, expected = made
    model = floated(whole.onnx, ["second"])
    assert Session(model).audit() == {"stem": "int8", "first": "int8", "second": "float32", "linear": "int8"}
    assert compare(expected, Session(model).run(batch)).sqnr_db > 30
    loose = floated(whole.onnx, ["second"], grids=False)  # ONNX Runtime wants a grid behind a convolution of integers
    assert Session(loose).audit() == {"stem": "int8", "first": "float32", "second": "float32", "linear": "int8"}


def test_codes_times_scales_are_what_was_decoded(made):
    _, whole, batch, _ = made
    model, plain = floated(whole.onnx, LAYERS), Residual().eval()
    state = {}
    for path in LAYERS:
        layer = made[0].get_submodule(path)
        state |= {f"{path}.weight": layer.dequantized(), f"{path}.bias": layer.bias}
    plain.load_state_dict(state)
    np.testing.assert_allclose(Session(model).run(batch)[0], plain(batch).detach(), atol=1e-5)


def grids(model):
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load_model_from_string(model).graph.node)


def test_grids_that_no_integer_operator_reads_go(made):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 32, 1), nn.GELU(), nn.Conv1d(32, 8, 1), nn.LayerNorm(16)).eval()
        batch = torch.randn(8, 4, 16)
    data = Data(example=batch[:1], calibrate=[(batch, batch)], loss="mse")
    small = run(QuantizeStatic(), model, Context(data=data)).model
    whole = subject(small, data)
    fewer = floated(whole.onnx, (), grids=False)
    assert grids(whole.onnx) > grids(fewer) == 2
    assert compare(expected_outputs(small, batch), Session(fewer).run(batch)).sqnr_db > 30


def test_a_linear_layer_has_no_grid_that_nothing_reads():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8), nn.LayerNorm(8)).eval()
        batch = torch.randn(8, 4, 16)
    data = Data(example=batch[:1], calibrate=[(batch, batch)], loss="mse")
    whole = subject(run(QuantizeStatic(), model, Context(data=data)).model, data)
    assert audit(whole.onnx)["QuantizeLinear"] == 2
    assert Session(whole.onnx).audit() == {"0": "int8", "2": "int8"}


def test_layers_alike_are_one_group(made):
    assert alike(made[1].onnx) == [["stem"], ["first", "second"], ["linear"]]
    assert alike(made[1].onnx, most=2) == [["stem"], ["first", "second"], ["linear"]]  # kernels differ too
    assert alike(floated(made[1].onnx, ["linear"])) == [["stem"], ["first", "second"]]


def choice(made, tmp_path, monkeypatch, cost):
    """What is chosen where a call takes the sum of `cost[path]` (int8, float) over the layers."""
    _, whole, batch, expected = made
    costs = {}

    def rounds(calls, *_):
        return {name: [costs[id(call)] * (1 + 0.001 * place) for place in range(20)] for name, call in calls.items()}

    real = Session.prepared

    def prepared(self, inputs):
        call = real(self, inputs)
        runs = self.audit()
        costs[id(call)] = sum(cost[path][runs[path] != "int8"] for path in LAYERS)
        kept.append(call)
        return call

    kept = []
    monkeypatch.setattr(featherweight.precision, "rounds", rounds)
    monkeypatch.setattr(Session, "prepared", prepared)
    found = deliveries(whole, ["onnxruntime"], tmp_path, batch, expected)
    return settled(whole, found, tmp_path, batch, expected, batch[:1])[0]


@pytest.mark.parametrize(
    ("cost", "form", "floats"),
    [
        ({"stem": (2, 1), "first": (1, 3), "second": (1, 3), "linear": (2, 1)}, "mixed", ("stem", "linear")),
        ({"stem": (2, 1), "first": (3, 1), "second": (3, 1), "linear": (2, 1)}, "float", LAYERS),
        ({"stem": (1, 2), "first": (1, 3), "second": (1, 3), "linear": (1, 2)}, "int8", ()),
        ({"stem": (2, 1), "first": (3, 1), "second": (3, 1), "linear": (1, 2)}, "mixed", ("stem", "first", "second")),
    ],
)
def test_layers_that_are_slower_as_integers_are_computed_with_floats(made, tmp_path, monkeypatch, cost, form, floats):
    item = choice(made, tmp_path, monkeypatch, cost)
    assert (item.form, item.kept_float) == (form, floats)
    assert item.tried[form] == min(item.tried.values())
    assert {row["path"] for row in item.layers if row["runs"] == "float32"} == set(floats)
    facts = item.to_dict()
    assert facts["kept_float"] == list(floats)
    assert set(facts["tried"]) >= {"int8", "float"}


def test_what_has_no_integer_layers_or_no_graph_is_left_alone(made, tmp_path):
    _, whole, batch, expected = made
    whole = Subject(floated(whole.onnx, LAYERS), batch, whole.program)
    found = deliveries(whole, ["onnxruntime"], tmp_path, batch, expected)
    assert settled(whole, found, tmp_path, batch, expected, batch) == found
    found = deliveries(made[1], ["torch", "nowhere"], tmp_path, batch, expected)
    assert settled(made[1], found, tmp_path, batch, expected, batch) == found
    assert timed(found, batch[:1])[0].to_dict().keys() >= {"latency", "runtime"}
