"""Structured pruning: the least important channels go, physically, and with them everything coupled."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import Keep
from featherweight.errors import RecipeError
from featherweight.graph import coupled_groups
from featherweight.measurement import structure
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import PruneChannels, cuts
from featherweight.techniques.unit_costs import unit_macs
from featherweight.zoo import randomise, small_models


def prune(model, example, step=None, calibrate=None, **settings):
    context = Context(data=Data(example=example, calibrate=calibrate), seed=1)
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


def test_units_that_must_leave_together_are_ranked_together():
    """By single units three of each layer would stay, but the last two of the first are worth more than those of the second."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    sizes = torch.ones(1), torch.tensor([1.3, 1.3, 1.3, 0.1]), torch.tensor([2.4, 0.6, 0.6, 0.4]), torch.ones(1)
    for layer, inside, outside in zip(model, sizes, sizes[1:], strict=False):
        layer.weight.data = torch.outer(outside, inside)
        nn.init.zeros_(layer.bias)
    alone, _, _ = prune(model, torch.ones(1, 1), ratio=0.25, ranking="global")
    assert (alone[0].out_features, alone[1].out_features) == (3, 3)
    output, _, _ = prune(model, torch.ones(1, 1), ratio=0.25, ranking="global", multiple=2)
    assert (output[0].out_features, output[1].out_features) == (4, 2)


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
    assert after < 0.6 * before or name in ("transformer", "twice")
    undone = [u.reason for u in context.untouched if u.reason.startswith("undone")]
    assert all("persistent=False" in reason for reason in undone)  # the transformer's table of positions is no state


class Stacked(nn.Module):
    """Two bidirectional layers: four groups that must keep as many units each."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(24, 3)

    def forward(self, steps):
        return self.classifier(self.lstm(steps)[0][:, -1])


@pytest.mark.parametrize("ranking", ["group", "global", "isomorphic"])
def test_a_stacked_recurrent_layer_is_cut_in_one_edit(ranking):
    torch.manual_seed(0)
    model = Stacked()
    with torch.no_grad():
        for name, weight in model.lstm.named_parameters():
            if "l0" in name:
                weight *= 0.5
    example = torch.randn(2, 4, 5)
    output, edits, context = prune(model, example, ratio=0.5, ranking=ranking)
    assert [left.path for left in context.untouched] == ["classifier"]
    assert len([edit for edit in edits if isinstance(edit, Keep)]) == 1
    assert output.lstm.hidden_size == 6
    assert output.classifier.in_features == 12
    assert output(example).shape == (2, 3)


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


def test_the_width_of_an_embedding_is_an_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 2))
    tokens = torch.tensor([[1, 2, 3]])
    _, edits, _ = prune(model, tokens, only("1", PruneChannels(ratio=0.5)))
    assert not edits
    output, edits, _ = prune(model, tokens, only("0, 1", PruneChannels(ratio=0.5)))
    assert output[0].embedding_dim == output[2].in_features == 4
    assert output[2].out_features == 6


def test_bare_parameters_out_of_scope_are_left():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inner, self.head = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, value):
            return self.head(self.inner((value @ self.weight).relu()).relu())

    output, _, _ = prune(Bare(), torch.ones(1, 3), only("inner", PruneChannels(ratio=0.5)))
    assert output.weight.shape == (3, 8)
    assert output.inner.weight.shape == (4, 8)
    output, _, _ = prune(Bare(), torch.ones(1, 3), PruneChannels(ratio=0.5))
    assert output.weight.shape == (3, 4)
    assert output.inner.weight.shape == (4, 4)


def test_a_transposed_convolution_behind_the_scope_loses_inputs_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 2, 1))
    output, _, _ = prune(model, torch.ones(1, 3, 4, 4), only("0", PruneChannels(ratio=0.5)))
    assert (output[0].out_channels, output[1].in_channels, output[1].out_channels) == (4, 4, 6)
    output, _, _ = prune(model, torch.ones(1, 3, 4, 4), only("1", PruneChannels(ratio=0.5)))
    assert (output[0].out_channels, output[1].in_channels, output[1].out_channels) == (8, 8, 3)


def test_mildest_is_the_identity():
    task = small_models()["residual"]
    assert not prune(task.model, task.data.example, PruneChannels().mildest())[1]


def two_widths():
    """Hidden layers of 16 and 16 equal units, and one of 8 with far smaller weights; scores are relative to each group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 2))
    for layer in model:
        nn.init.normal_(layer.weight)
    return model


def test_isomorphic_ranking_compares_only_groups_of_the_same_shapes():
    model = two_widths()
    model[1].weight.data[:, 2:] *= 1e-3  # most of the first hidden layer is next to nothing
    model[0].weight.data[2:] *= 1e-3
    together, _, _ = prune(model, torch.ones(1, 4), ratio=0.5, ranking="global")
    alike, _, _ = prune(model, torch.ones(1, 4), ratio=0.5, ranking="isomorphic")
    assert together[0].out_features == 2
    assert together[3].out_features > 4  # pays less, since the first pays more
    assert alike[3].out_features == 4  # alone of its form
    assert alike[0].out_features == alike[1].out_features == alike[2].out_features == 8


def test_rivals_share_one_threshold():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    for layer in model:
        nn.init.ones_(layer.weight)
    model[1].weight.data[4:] = 1e-3
    model[2].weight.data[:, 4:] = 1e-3
    output, _, _ = prune(model, torch.ones(1, 16), ratio=0.25, ranking="isomorphic")
    assert [layer.out_features for layer in output] == [16, 4, 16, 12, 2]


def test_data_driven_importance_asks_for_calibration_data():
    for settings in (
        {"importance": "taylor"},
        {"importance": "fisher"},
        {"importance": "activation"},
        {"reconstruct": True},
    ):
        assert PruneChannels(**settings).needs == {"calibrate"}
        with pytest.raises(RecipeError, match="calibrate"):
            prune(pair(), torch.ones(1, 2), **settings)
    assert not PruneChannels().needs


def two_layers(kind):
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 5)), torch.randn(64, 6)
    first = nn.Conv2d(3, 12, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(12, 4, 3, stride=2, padding=1)), torch.randn(16, 3, 8, 8)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_reconstruction_lowers_the_error_of_the_layer_behind_to_the_least_possible(kind):
    model, inputs = two_layers(kind)
    plain, _, _ = prune(model, inputs, ratio=0.5)
    fitted, edits, _ = prune(model, inputs, ratio=0.5, reconstruct=True, calibrate=[inputs])
    assert [type(edit).__name__ for edit in edits] == ["Keep", "Write"]
    assert torch.equal(plain[0].weight, fitted[0].weight)
    with torch.no_grad():
        wanted = model(inputs) - model[2].bias.reshape(-1, *[1] * (inputs.dim() - 2))
        hidden = fitted[:2](inputs)
        rows = hidden if kind == "linear" else nn.functional.unfold(hidden, 3, padding=1, stride=2).mT.flatten(0, 1)
        best = torch.linalg.lstsq(rows.double(), wanted.movedim(1, -1).reshape(len(rows), -1).double()).solution
        least = float((rows.double() @ best - wanted.movedim(1, -1).reshape(len(rows), -1)).square().mean())
        errors = [float((other(inputs) - model(inputs)).square().mean()) for other in (plain, fitted)]
    assert least <= errors[1] < 1.02 * least + 1e-9
    assert errors[1] < 0.7 * errors[0]


def test_reconstruction_gives_a_twin_the_work_of_the_one_that_left():
    """Two equal inputs: one goes, and the other's weight becomes the sum of both; what a ridge costs is next to nothing."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    model[1].weight.data = torch.tensor([[1.0, 3.0, 5.0, 2.0], [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    inputs = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    output, _, _ = prune(model, inputs[:2], ratio=0.5, reconstruct=True, calibrate=[inputs])
    assert torch.allclose(output[1].weight, torch.tensor([[4.0, 7.0], [1.0, 2.0], [1.0, 1.0]]), atol=0.02)


def test_reconstruction_leaves_what_is_out_of_scope():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    step = only("0", PruneChannels(ratio=0.5, reconstruct=True))
    _, edits, _ = prune(model, torch.ones(1, 3), step, calibrate=[torch.randn(20, 3)])
    assert [type(edit).__name__ for edit in edits] == ["Keep"]


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


def test_trials_on_the_same_weights_trace_once(monkeypatch):
    """Another ratio is not traced anew; other weights, another structure of the same weights and the other units of attention are."""
    traced = []
    monkeypatch.setattr(cuts, "coupled_groups", lambda *given: traced.append(given[3]) or coupled_groups(*given))
    context = Context(data=Data(example=torch.ones(1, 2)), seed=1)
    model = pair()
    outputs = [run(PruneChannels(ratio=ratio), model, context).model[0].out_features for ratio in (0.25, 0.5)]
    assert (outputs, traced) == ([3, 2], ["heads"])
    run(PruneChannels(ratio=0.5, attention="width"), model, context)
    run(PruneChannels(ratio=0.5), nn.Sequential(model[0], nn.Tanh(), model[2]), context)
    model[0].bias.data += 1
    run(PruneChannels(ratio=0.5), model, context)
    assert traced == ["heads", "width", "heads", "heads"]


def test_ranking_by_multiply_adds_takes_the_dear_units_first():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.AvgPool2d(4), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1))
    model = randomise(nn.Sequential(*layers), 0).eval()
    data = Data(example=torch.randn(1, 3, 16, 16))
    kept = {}
    for ranking in ("global", "macs"):
        cut = run(PruneChannels(ratio=0.5, ranking=ranking, minimum=1), model, Context(data=data)).model
        kept[ranking] = cut[0].out_channels, cut[2].out_channels
    assert kept["macs"][0] < kept["global"][0]


def test_multiply_adds_of_units_are_those_the_cut_saves():
    model = small_models()["residual"]
    groups, _ = coupled_groups(model.model, (torch.randn(2, 3, 8, 8),))
    before = structure(model.model, model.data).macs
    for group, macs in zip(groups, unit_macs(model.model, groups, Context(data=model.data)), strict=True):
        path = group.name
        small = run(only(path, PruneChannels(ratio=1 / len(group), minimum=1)), model.model, Context(data=model.data))
        if small.edits:
            assert before - structure(small.model, model.data).macs == pytest.approx(macs)
