"""Recurrent factors: exact at full rank with states, best on what enters, and smaller or not at all."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from featherweight.data import Data
from featherweight.edits import from_json, replay, to_json
from featherweight.layers import build
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import FactorRecurrent, PruneWeights, QuantizeWeights


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.recurrent = layer

    def forward(self, steps, start=None):
        return self.recurrent(steps, start)


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(layer, inputs, calibrate=None, **settings):
    context = Context(data=Data(example=inputs, calibrate=[inputs] if calibrate is None else calibrate))
    output, edits = run(FactorRecurrent(**settings), Model(layer).eval(), context)
    return output, edits, context


def made(build, *sizes, **options):
    torch.manual_seed(0)
    return build(*sizes, **options).eval().requires_grad_(False)


def matrices(layer, kind):
    return {name: value for name, value in layer.named_parameters() if name.startswith(f"weight_{kind}")}


def of_rank(value, rank, seed):
    rows, columns = value.shape
    return drawn(rows, rank, seed=seed) @ drawn(rank, columns, seed=seed + 1) / (rank * columns) ** 0.5


def counted(module):
    return sum(value.numel() for value in module.parameters())


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "bias": False, "dropout": 0.5},
    ],
)
@pytest.mark.parametrize("hidden", ["dense", "factors", "shared"])
def test_matrices_of_low_rank_come_back_with_states(kind, options, hidden):
    """Layers whose matrices have rank 3, jointly where they share; packed, unbatched and given states too."""
    layer = made(kind, 10, 12, **options)
    ways = 2 if layer.bidirectional else 1
    for place in range(layer.num_layers):
        both = [f"weight_ih_l{place}{suffix}" for suffix in ("", "_reverse")[:ways]]
        if hidden == "shared" and ways == 1 and place:
            both.append(f"weight_hh_l{place - 1}")
        stacked = of_rank(torch.cat([layer.get_parameter(name) for name in both]), 3, 10 * place)
        for name, rows in zip(both, stacked.chunk(len(both)), strict=True):
            layer.get_parameter(name).copy_(rows)
        for name in matrices(layer, "hh"):
            if name.startswith(f"weight_hh_l{place}") and (
                hidden != "shared" or ways == 2 or place == layer.num_layers - 1
            ):
                layer.get_parameter(name).copy_(of_rank(layer.get_parameter(name), 3, 7 + place))
    steps = drawn(5, 5, 10)
    count = layer.num_layers * ways
    states = drawn(count, 5, 12, seed=2), drawn(count, 5, 12, seed=3)
    start = states if kind is nn.LSTM else states[0]
    output, edits, _ = factor(layer, steps, hidden=hidden, method="svd", energy=1 - 1e-9)
    assert [edit.kind for edit in edits] == [f"factored_{kind.__name__.lower()}"]
    ours = output.recurrent
    ranks = edits[0].options["input_ranks"] + [rank for rank in edits[0].options["hidden_ranks"] if rank]
    assert set(ranks) == {3}
    assert counted(ours) < counted(layer)
    close(ours(steps), layer(steps))
    close(ours(steps, start), layer(steps, start))
    alone = tuple(state[:, 0] for state in states) if kind is nn.LSTM else states[0][:, 0]
    close(ours(steps[0], alone), layer(steps[0], alone))
    packed = pack_padded_sequence(
        steps, torch.tensor([3, 5, 1, 4, 2]), batch_first=layer.batch_first, enforce_sorted=False
    )
    close(ours(packed, start), layer(packed, start))
    if hidden == "shared" and ways == 1:
        assert ours.projections[1].weight is ours.layers[0].hidden[0][0].weight
    again = replay(Model(kind(10, 12, **options)), from_json(to_json(edits)))
    again.load_state_dict(output.state_dict(), strict=True)
    assert all(map(torch.equal, leaves(again.eval()(steps)), leaves(output(steps))))


def leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in leaves(part)]


@pytest.mark.parametrize("rank", range(1, 5))
def test_the_whitened_error_of_the_gates_is_the_dropped_energy(rank):
    """By hand: eigenvalues of `W C W^T`, both directions stacked, from the inputs alone; plain factors lose more."""
    layer = made(nn.LSTM, 16, 12, bidirectional=True, batch_first=True)
    steps = drawn(20, 9, 16) * torch.logspace(0, -2, 16) @ torch.linalg.qr(drawn(16, 16, seed=2)).Q + drawn(16, seed=4)
    weight = torch.cat(tuple(matrices(layer, "ih").values())).double()
    bias = torch.cat((layer.bias_ih_l0, layer.bias_ih_l0_reverse)).double()
    flat = steps.reshape(-1, 16).double()
    energies = torch.linalg.eigvalsh(weight @ torch.cov(flat.T, correction=0) @ weight.T).flip(0)
    found = {}
    for method in ("svd", "whitened"):
        ratio = 1 - (rank + 0.5) * 112 / (96 * 16)
        output, edits, _ = factor(layer, steps, method=method, rank="ratio", ratio=ratio)
        assert edits[0].options["input_ranks"] == [rank]
        inner = output.recurrent.layers[0]
        later = torch.cat((inner.weight_ih_l0, inner.weight_ih_l0_reverse)).double()
        biases = torch.cat((inner.bias_ih_l0, inner.bias_ih_l0_reverse)).double()
        gates = flat @ (later @ output.recurrent.projections[0].weight.double()).T + biases
        found[method] = float((gates - flat @ weight.T - bias).square().sum(1).mean().detach())
    assert found["whitened"] == pytest.approx(float(energies[rank:].sum()), rel=1e-4)
    assert found["whitened"] < found["svd"]


def test_hidden_factors_are_fitted_to_hidden_states_over_time():
    """A second moment of hidden states far from the identity: whitened factors follow the layer closer than plain ones."""
    layer = made(nn.GRU, 1, 24, batch_first=True)  # one input: its matrix cannot be factored
    layer.weight_ih_l0.mul_(torch.logspace(0.8, -1.5, 24).repeat(3)[:, None])
    steps = drawn(30, 12, 1)
    found = {}
    for method in ("svd", "whitened"):
        output, edits, _ = factor(layer, steps, method=method, rank="ratio", ratio=0.6, hidden="factors")
        assert (edits[0].options["input_ranks"], edits[0].options["hidden_ranks"]) == ([0], [7])
        found[method] = float((output(steps)[0] - layer(steps)[0]).detach().square().mean())
    assert found["whitened"] < 0.7 * found["svd"]


def test_what_is_not_smaller_stays_dense_and_is_named():
    layer = made(nn.LSTM, 3, 16, 2)
    output, edits, context = factor(layer, drawn(5, 2, 3), rank="ratio", ratio=0.3, hidden="dense")
    assert edits[0].options["input_ranks"] == [2, 8]  # by hand: 2 (3 + 64) of 192 and 8 (16 + 64) of 1024
    assert isinstance(output.recurrent.projections[1], nn.Linear)
    output, edits, context = factor(layer, drawn(5, 2, 3), energy=1.0, hidden="factors", method="svd")
    assert not edits
    assert {note.path for note in context.untouched} == {
        f"recurrent.weight_{kind}_l{place}" for kind in ("ih", "hh") for place in (0, 1)
    }
    assert any("1024 weights" in note.reason for note in context.untouched)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_left_and_why():
    tied = nn.ModuleDict({"a": nn.GRU(8, 8), "b": nn.GRU(8, 8)})
    tied["b"].weight_hh_l0 = tied["a"].weight_hh_l0

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = tied

        def forward(self, x):
            return self.parts["b"](self.parts["a"](x)[0])[0]

    context = Context(data=Data(example=drawn(3, 2, 8)))
    _, edits = run(FactorRecurrent(method="svd", rank="ratio"), Both().eval(), context)
    assert not edits
    assert all("tied" in note.reason for note in context.untouched)
    _, edits, context = factor(made(nn.LSTM, 8, 8, proj_size=4), drawn(3, 2, 8), method="svd", rank="ratio")
    assert not edits
    assert "projections" in context.untouched[0].reason


def test_factors_train_prune_quantize_and_export():
    layer = made(nn.LSTM, 10, 16, 2, batch_first=True)
    steps = drawn(6, 5, 10)
    low = FactorRecurrent(rank="ratio", ratio=0.4, hidden="shared")
    output, edits, _ = factor(layer, steps, rank="ratio", ratio=0.4, hidden="shared")
    training = copy.deepcopy(output).train().requires_grad_(True)
    training(steps)[0].sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in training.parameters())
    graph = export_graph(output, Data(example=steps))
    assert len(graph.weights) == len(list(output.parameters()))  # the shared factor once
    context = Context(data=Data(example=steps, calibrate=[steps]))
    small, edits = run(Recipe((low, PruneWeights(ratio=0.5), QuantizeWeights(bits=8))), Model(layer), context)
    assert type(small.recurrent.projections[0]).__name__ == "QuantizedLinear"
    for part in (small.recurrent.layers[1].hidden[0][1], small.recurrent.layers[1].incoming[0]):
        assert type(part).__name__ == "QuantizedLinear"
        assert (part.codes == 0).float().mean() > 0.2
    again = replay(Model(nn.LSTM(10, 16, 2, batch_first=True)), from_json(to_json(edits)))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again.eval()(steps)[0], small(steps)[0])


def test_a_kind_that_makes_no_sense_is_refused():
    options = {"input_size": 4, "hidden_size": 4, "input_ranks": [2], "hidden_ranks": [2, 2]}
    with pytest.raises(Exception, match="one input rank"):
        build("factored_lstm", options)
    with pytest.raises(Exception, match="one direction"):
        build("factored_gru", options | {"input_ranks": [2, 2], "shared": True, "bidirectional": True})
    assert math.isclose(build("factored_gru", options | {"input_ranks": [2, 2], "dropout": 0.25}).dropout, 0.25)
