"""Parameters that no layer holds: rounded by hand, smaller in the file, and reached by a budget that layers alone cannot keep."""

import pytest
import torch
from torch import nn

from featherweight import Data, compress
from featherweight.artifact import package
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import QuantizeWeights, RoundParameters


class Experts(nn.Module):
    """A matrix and four batched experts that the forward multiplies with by itself, a vector, and a layer."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Parameter(torch.randn(16, 16))
        self.experts = nn.Parameter(torch.randn(4, 16, 32) / 4)
        self.shift = nn.Parameter(torch.randn(1, 32))
        self.leave = nn.Linear(32, 3)

    def forward(self, x):
        mixed = torch.einsum("bi,eio->beo", torch.tanh(x @ self.enter), self.experts).amax(1)
        return self.leave(mixed + self.shift)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Experts().eval()


@pytest.fixture
def data():
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    batches = [(x, x[:, :3].argmax(1)) for x in inputs.split(32)]
    return Data(example=inputs[:2], train=batches[:4], calibrate=batches[:4], validate=batches[4:6], test=batches[6:])


def test_values_by_hand_and_what_is_left(model, data):
    with torch.no_grad():
        model.enter.copy_(torch.linspace(-3, 3, 256).reshape(16, 16))
    context = Context(data=data, teacher=model)
    rounded, edits = run(RoundParameters(bits=3), model, context)
    assert len(edits) == 1
    step = rounded.enter.unique().diff()[0]
    assert torch.allclose(rounded.enter, (model.enter / step).round().clamp(-3, 3) * step)
    assert rounded.experts.unique().numel() <= 7
    assert torch.equal(rounded.shift, model.shift), "one row is a vector"
    assert rounded.leave.weight.unique().numel() <= 7, "a layer that is still float counts too"
    _, edits = run(RoundParameters(bits=3), rounded, context)
    assert edits == []
    assert "no more than 8 different values" in context.untouched[-1].reason
    scoped, _ = run(only("leave", RoundParameters(bits=3)), model, context)
    assert torch.equal(scoped.enter, model.enter)
    assert torch.equal(scoped.leave.weight, run(RoundParameters(bits=3), model, context).model.leave.weight)


def test_codes_of_layers_stay_and_zeros_too(model, data):
    with torch.no_grad():
        model.enter[:8] = 0
    context = Context(data=data, teacher=model)
    quantized, _ = run(QuantizeWeights(bits=4), model, context)
    rounded, _ = run(QuantizeWeights(bits=4) + RoundParameters(), model, context)
    assert torch.equal(rounded.leave.codes, quantized.leave.codes)
    assert torch.equal(rounded.leave.scale, quantized.leave.scale)
    assert not rounded.enter[:8].any()


def test_the_file_takes_a_byte_a_value_and_the_function_stays(model, data):
    context = Context(data=data, teacher=model)
    rounded, edits = run(RoundParameters(), model, context)
    sizes = [
        len(package(one, how, {}, export_graph(one, data)).to_bytes()) for one, how in ((model, []), (rounded, edits))
    ]
    values = model.enter.numel() + model.experts.numel() + model.leave.weight.numel()
    assert sizes[0] - sizes[1] > 2 * values
    with torch.no_grad():
        wanted, given = model(data.example), rounded(data.example)
    assert not torch.equal(wanted, given)
    assert (wanted - given).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("trained", [True, False])
def test_a_budget_that_layers_alone_cannot_keep(model, data, trained):
    if not trained:
        data = Data(example=data.example, calibrate=data.calibrate, validate=data.validate, test=data.test)
    artifact = compress(model, data, "size<=42%", epochs=2, trials=1)
    assert artifact.report.verdict["met"], artifact.report.verdict["text"]
    assert artifact.report.recipe.rstrip().splitlines()[-1] == "- round_parameters"
    layers, edits = run(QuantizeWeights(bits=2), model, Context(data=data, teacher=model))
    alone = len(package(layers, edits, {}, export_graph(layers, data)).to_bytes())
    assert alone > artifact.report.verdict["rows"][0]["allowed"], "the layer's weights are a twentieth of all"
