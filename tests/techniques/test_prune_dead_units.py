"""What only zeros read leaves, and nothing that the model computes changes."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import PruneDeadUnits, PruneWeights
from featherweight.zoo import randomise


def prune(model, example, step=None):
    context = Context(data=Data(example=example))
    output, edits = run(step or PruneDeadUnits(), model.eval(), context)
    return output, edits, context


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 3))


def test_units_that_nothing_reads_leave():
    model = mlp()
    model[2].weight.data[:, [1, 4]] = 0
    output, _, _ = prune(model, torch.randn(1, 6))
    assert (output[0].out_features, output[2].in_features, output[2].out_features) == (6, 6, 5)
    assert torch.equal(output[0].bias, model[0].bias[[0, 2, 3, 5, 6, 7]])
    inputs = torch.randn(20, 6)
    assert torch.allclose(output(inputs), model(inputs), atol=1e-6)


def test_what_only_dead_units_read_is_dead():
    model = mlp()
    model[2].weight.data[1:, 7] = 0  # unit 0 of the next layer alone reads it
    model[4].weight.data[:, 0] = 0
    output, _, _ = prune(model, torch.randn(1, 6))
    assert (output[0].out_features, output[2].out_features) == (7, 4)
    inputs = torch.randn(20, 6)
    assert torch.allclose(output(inputs), model(inputs), atol=1e-6)


def test_a_whole_network_stays_a_network():
    model = mlp()
    model[4].weight.data.zero_()
    output, _, _ = prune(model, torch.randn(1, 6))
    assert output[2].out_features == 1
    assert torch.equal(output(torch.randn(4, 6)), model(torch.randn(4, 6)))


def test_a_unit_that_still_counts_in_a_norm_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    model[2].weight.data[:, 2] = 0
    output, edits, context = prune(model, torch.randn(1, 6))
    assert output[0].out_features == 8
    assert not edits
    assert "statistics" in context.untouched[-1].reason


@pytest.mark.parametrize("kind", ["convolutions", "lstm"])
def test_unstructured_pruning_ends_in_a_smaller_network(kind):
    torch.manual_seed(1)
    if kind == "lstm":

        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(5, 24, batch_first=True)
                self.linear = nn.Linear(24, 3)

            def forward(self, x):
                return self.linear(self.lstm(x)[0][:, -1])

        model, inputs = Reader(), torch.randn(4, 7, 5)
        model.lstm.weight_hh_l0.data[:, 5:11] = 0
        model.linear.weight.data[:, 5:11] = 0
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 3)
        )
        inputs = torch.randn(4, 3, 6, 6)
        randomise(model, 0)
    model.eval()
    step = Recipe((PruneWeights(ratio=0.97 if kind == "convolutions" else 0.0), PruneDeadUnits()))
    output, _, context = prune(model, inputs[:1], step)
    sparse, _, _ = prune(model, inputs[:1], step.steps[0])
    assert size(output) < 0.85 * size(model)
    assert torch.allclose(output(inputs), sparse(inputs), atol=1e-5)
    assert all(name in dict(output.named_parameters()) for name in context.sparse)
