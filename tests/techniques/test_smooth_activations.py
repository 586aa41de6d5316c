"""SmoothQuant: ranges move from activations to weights where that helps, and only there."""

import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import QuantizeStatic, SmoothActivations
from featherweight.techniques.links import Link, links


def outliers(gain=60.0):
    """A norm in front of two layers; one of its channels is far larger than the others."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.left, self.right = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            entered = self.norm(x)
            return torch.cat([self.left(entered), self.right(entered)], 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = Block().eval(), torch.randn(64, 8)
    model.norm.weight.data[3] = gain
    for layer in (model.left, model.right):
        layer.weight.data[:, 3] /= gain
    return model, Data(example=inputs[:1], calibrate=[inputs], loss="mse"), inputs


def noise(model, inputs, data, *recipe):
    output, _ = run(Recipe(recipe), model, Context(data=data))
    with torch.no_grad():
        return float((output(inputs) - model(inputs)).square().sum() / model(inputs).square().sum())


def test_an_outlier_channel_is_divided_and_its_columns_take_it():
    model, data, inputs = outliers()
    assert links(model, Context(data=data)) == [Link("norm", ("left", "right"))]
    output, edits = run(SmoothActivations(), model, Context(data=data))
    assert len(edits) == 1
    assert output.norm.weight[3] < model.norm.weight[3] / 10
    with torch.no_grad():
        assert torch.allclose(output(inputs), model(inputs), atol=1e-4)
    quantize = QuantizeStatic(tolerance=0.0)
    assert noise(model, inputs, data, SmoothActivations(), quantize) < noise(model, inputs, data, quantize) / 4


def test_channels_that_round_well_are_left():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    model[0].weight.data = torch.eye(2)
    model[0].bias.data.zero_()
    model[2].weight.data = torch.eye(2) * 127
    inputs = torch.tensor([[255.0, 1.0], [0.0, 254.0]])  # already on the grid, and so are the weights
    context = Context(data=Data(example=inputs[:1], calibrate=[inputs]))
    _, edits = run(SmoothActivations(), model, context)
    assert edits == []
    assert [(u.path, u.reason) for u in context.untouched] == [("0", "its channels round best as they are")]


def test_behind_a_residual_sum_a_multiplication_takes_the_factors():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            entered = self.norm(x)
            return entered + self.inner(entered)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = PostNorm().eval(), torch.randn(64, 8)
    model.norm.weight.data[3] = 200.0
    model.inner.weight.data[:, 3] /= 200.0
    data = Data(example=inputs[:1], calibrate=[inputs], loss="mse")
    assert run(SmoothActivations(), model, Context(data=data)).edits == []
    output, edits = run(SmoothActivations(multiply=True), model, Context(data=data))
    assert [edit.kind for edit in edits] == ["scaled_linear"]
    assert output.inner.factors[3] < 0.2
    with torch.no_grad():
        assert torch.allclose(output(inputs), model(inputs), atol=1e-4)
    entered = model.norm(inputs)
    errors = []
    for recipe in (
        Recipe((QuantizeStatic(tolerance=0.0),)),
        Recipe((SmoothActivations(multiply=True), QuantizeStatic(tolerance=0.0))),
    ):
        small, _ = run(recipe, model, Context(data=data))
        with torch.no_grad():
            errors.append(float((small.inner(entered) - model.inner(entered)).square().sum()))
    assert errors[1] < errors[0] / 4
