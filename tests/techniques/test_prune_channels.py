"""Structured pruning: the least important channels go, physically, and with them everything coupled."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import PruneChannels
from featherweight.zoo import small_models


def prune(model, example, step=None, **settings):
    context = Context(data=Data(example=example), seed=1)
    output, edits = run(step or PruneChannels(**settings), model.eval(), context)
    return output, edits, context


def pair():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 2.0], [0.0, 8.0]])
    model[2].weight.data = torch.ones(3, 4)
    return model


@pytest.mark.parametrize("importance", ["l2", "l1"])
def test_the_least_important_go(importance):
    model = pair()
    output, edits, _ = prune(model, torch.ones(1, 2), ratio=0.5, importance=importance)
    assert torch.equal(output[0].weight, model[0].weight[[1, 3]])
    assert torch.equal(output[0].bias, model[0].bias[[1, 3]])
    assert torch.equal(output[2].weight, model[2].weight[:, [1, 3]])
    assert (output[0].out_features, output[2].in_features, output[2].out_features) == (2, 2, 3)
    assert len(edits) == 1


def test_minimum_and_multiple():
    output, _, _ = prune(pair(), torch.ones(1, 2), ratio=0.99)
    assert output[0].out_features == 2
    output, _, _ = prune(nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 2)), torch.ones(1, 3), ratio=0.5, multiple=8)
    assert output[0].out_features == 8


def test_random_importance_draws_from_the_seed():
    model = nn.Sequential(nn.Linear(3, 32), nn.Linear(32, 2))
    first, second = (prune(model, torch.ones(1, 3), importance="random")[0] for _ in range(2))
    assert torch.equal(first[0].weight, second[0].weight)


def test_global_ranking_takes_from_where_it_hurts_least():
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    torch.manual_seed(0)
    for layer in model:
        nn.init.normal_(layer.weight)
    model[0].weight.data[8:] *= 1e-3
    model[1].weight.data[:, 8:] *= 1e-3
    output, _, _ = prune(model, torch.ones(1, 4), ratio=0.25, ranking="global")
    assert output[0].out_features == 8
    assert output[1].out_features == 16


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "perceptron", "recurrent", "transformer", "twice"])
def test_every_family_gets_smaller_or_says_why(name):
    task = small_models()[name]
    output, edits, context = prune(task.model, task.data.example, ratio=0.5)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (task.model, output))
    assert after < before if edits else context.untouched
    assert after < 0.6 * before or name in ("recurrent", "transformer", "twice")
    assert not [u for u in context.untouched if u.reason.startswith("undone")]


def test_a_residual_stream_is_cut_as_one():
    task = small_models()["residual"]
    output, _, _ = prune(task.model, task.data.example, ratio=0.5)
    assert output.stem.out_channels == output.first.conv2.out_channels == output.first.norm2.num_features == 4
    assert output.projection.out_channels == output.second.conv2.out_channels == output.classifier.in_features == 6


def test_depthwise_groups_follow():
    task = small_models()["branches"]
    output, _, _ = prune(task.model, task.data.example, ratio=0.5)
    assert output.depthwise.groups == output.depthwise.in_channels == output.stem.out_channels == 4


class Fixed(nn.Module):
    """A size written into the code, which no trace shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).reshape(-1, 8))


def test_a_size_in_the_code_is_refused_and_said():
    model = Fixed()
    output, edits, context = prune(model, torch.ones(1, 3))
    assert not edits
    assert any(u.path.startswith("a") for u in context.untouched)
    assert output.a.weight.shape == (8, 3)
    assert torch.equal(output(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_scope():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    output, edits, _ = prune(model, torch.ones(1, 3), only("1", PruneChannels(ratio=0.5)))
    assert len(edits) == 1
    assert [layer.out_features for layer in output] == [8, 4, 2]


def test_mildest_is_the_identity():
    task = small_models()["residual"]
    assert not prune(task.model, task.data.example, PruneChannels().mildest())[1]


def test_what_cannot_be_traced_is_said():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x) if x.sum().item() > 0 else self.fc(-x)

    _, edits, context = prune(Untraceable(), torch.ones(1, 2))
    assert not edits
    assert "traced" in context.untouched[0].reason
