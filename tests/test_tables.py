"""Damage and cost tables: what is predicted against what the network really loses, and what the file really takes."""

import copy
import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from featherweight.allocation import PREPARED, Healing, Tables, measure_tables, recipe_of, solve, tables_of
from featherweight.allocation.tables import FINE, SHARES, corrected
from featherweight.allocation.treatments import Treatment, frontier
from featherweight.allocation.truth import Reference
from featherweight.artifact import package
from featherweight.coding import encode_tensor
from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.layers.quantized import limit
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import SplitLayers
from featherweight.techniques.rounding import grid_scale, to_codes


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5)).eval()


@pytest.fixture(scope="module")
def context():
    torch.manual_seed(1)
    batches = [(torch.randn(64, 20), torch.zeros(64, dtype=torch.long)) for _ in range(6)]
    return Context(data=Data(example=torch.ones(1, 20), calibrate=batches), seed=0)


@pytest.fixture(scope="module")
def tables(network, context):
    return measure_tables(network, context)


def treatment(tables, name, **wanted):
    row = next(row for row in tables.rows if row.name == name)
    return next(one for one in row.treatments if all(getattr(one, key) == value for key, value in wanted.items()))


def test_rows_and_groups_are_the_network(tables, network):
    assert [(row.name, row.makes, row.reads) for row in tables.rows] == [
        ("0.weight", 0, -1),
        ("2.weight", 1, 0),
        ("4.weight", -1, 1),
    ]
    assert [(group.names, group.units) for group in tables.groups] == [(("0",), 48), (("2",), 48)]
    plain = [row.treatments[0] for row in tables.rows]
    assert tables.fixed["params"] + sum(one.params for one in plain) == sum(p.numel() for p in network.parameters())
    assert sum(one.macs for one in plain) == 20 * 48 + 48 * 48 + 48 * 5
    assert tables.fixed["macs"] == 0


def test_few_groups_have_fine_shares_and_many_have_coarse_ones(tables, context):
    assert [group.shares for group in tables.groups] == [FINE, FINE]
    assert all(list(group.damages) == sorted(group.damages) and group.damages[0] == 0 for group in tables.groups)
    layers = [layer for _ in range(5) for layer in (nn.Linear(20, 20), nn.ReLU())]
    deep = measure_tables(nn.Sequential(*layers, nn.Linear(20, 5)).eval(), context)
    assert {group.shares for group in deep.groups} == {SHARES}


@pytest.mark.parametrize("bits", [3, 4])
def test_the_damage_of_rounding_is_that_of_the_network(tables, network, context, bits):
    """Independent errors: the diagonal of the curvature predicts them, up to the noise of its probes."""
    weight = network[2].weight
    step = grid_scale(weight, bits, per_channel=False)
    rounded = to_codes(weight, step, bits) * step
    true = Reference(network, context, 384).changed(network, {"2.weight": rounded})
    assert 0.6 < treatment(tables, "2.weight", bits=bits, density=1.0, rank=0).damage / true < 1.6


@pytest.mark.parametrize("density", [0.6, 0.16])
def test_the_damage_of_zeros_is_close_to_the_networks(tables, network, context, density):
    weight = network[2].weight.detach()
    kept = weight.abs() >= weight.abs().flatten().sort(descending=True).values[round(density * weight.numel()) - 1]
    true = Reference(network, context, 384).changed(network, {"2.weight": weight * kept})
    assert treatment(tables, "2.weight", bits=8, density=density).removal == pytest.approx(true, rel=0.3)


def test_bytes_are_about_those_of_the_coder():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200)).eval()
    data = Data(example=torch.ones(1, 200), calibrate=[(torch.randn(8, 200), torch.zeros(8))], loss="mse")
    found = measure_tables(model, Context(data=data))
    weight = model[0].weight.detach()
    kept = weight * (weight.abs() >= weight.abs().flatten().kthvalue(weight.numel() - 4000 + 1).values)
    codes = to_codes(kept, grid_scale(kept, 4, per_channel=False), 4)
    assert int(codes.abs().max()) == limit(4)
    predicted = treatment(found, "0.weight", bits=4, density=0.1).size
    assert predicted == pytest.approx(len(encode_tensor(codes)), rel=0.05)


def test_predictions_follow_the_ratios_between_those_tried():
    """True over predicted is 2 at 1 and 8 at 4; at 2, half way between on logarithmic scales, it is 4."""
    assert corrected([0.0, 1.0, 2.0, 4.0, 8.0], {1: 2.0, 3: 32.0}) == pytest.approx([0, 2, 8, 32, 64])
    assert corrected([0.0, 1.0], {}) == [0.0, 1.0]
    assert corrected([0.0, 1.0, 2.0, 4.0], {1: 2.0, 3: math.inf}) == pytest.approx([0, 2, 2 * 1000**0.5, 2000])
    assert corrected([4e-322, 8e-322], {0: 0.0}) == pytest.approx([1e-12, 2e-12], rel=1e-2)


def test_the_reference_is_a_divergence_in_nats(context):
    model = nn.Linear(20, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    reference = Reference(model, context, 100)
    assert reference.divergence(model) == 0
    bias = torch.tensor([math.log(3.0), 0.0])  # chances of 3/4 and 1/4 where both were 1/2
    wanted = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert reference.changed(model, {"bias": bias}) == pytest.approx(wanted, rel=1e-6)
    assert not model.bias.any()
    with pytest.raises(DataError, match="calibrate"):
        Reference(model, Context(data=Data(example=torch.ones(1, 20), calibrate=[])), 10)
    assert reference.changed(model, {"weight": torch.full((2, 20), torch.nan)}) == math.inf


def test_only_what_nothing_beats_is_offered():
    def one(bits, damage, size):
        return Treatment(bits, 1.0, 0, damage, 0.0, size, size, 1.0)

    best = [one(8, 0.0, 8.0), one(4, 1.0, 4.0), one(2, 2.0, 2.0)]
    assert frontier([one(3, 2.5, 3.0), *best, one(5, 1.0, 5.0)], ["size"]) == tuple(best)


def test_factors_keep_their_rank_when_channels_go():
    """60 x 40 at rank 5 has 500 entries; with half of the outputs, 350; a matrix would have half."""
    ranked = Treatment(4, 1.0, 5, 1.0, 0.0, 250.0, 500.0, 500.0)
    assert ranked.share("params", (60, 40), 0.5, 1.0) * 500 == pytest.approx(350)
    assert ranked.share("damage", (60, 40), 0.5, 1.0) == 0.5
    assert Treatment(4, 1.0, 0, 1.0, 0.0, 250.0, 500.0, 500.0).share("params", (60, 40), 0.5, 1.0) == 0.5


def test_tables_are_plain_data_and_kept_by_content(tables, network, context, tmp_path, monkeypatch):
    assert Tables.from_json(json.loads(json.dumps(tables.to_json()))) == tables
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables_of(network, context) == tables
    (file,) = (tmp_path / "featherweight").iterdir()
    monkeypatch.setattr("featherweight.allocation.storage.measure_tables", None)
    assert tables_of(network, context) == tables
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    with pytest.raises(TypeError):  # other weights, so they would be measured
        tables_of(other, context)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_text(file.read_text()[:100])
    assert tables_of(network, context) == tables


def test_families_are_scaled_apart(tables):
    scaled = tables.scaled({"channels": 0.5, "zeros": 2.0, "ranks": 3.0, "rounding": 5.0})
    assert scaled.groups[0].damages == tuple(0.5 * lost for lost in tables.groups[0].damages)
    for before, after in zip(tables.rows[1].treatments, scaled.rows[1].treatments, strict=True):
        assert after.removal == (3.0 if before.rank else 2.0) * before.removal
        assert after.rounding == 5.0 * before.rounding


def test_recurrent_layers_have_rows_and_equal_groups():
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 16, 2, batch_first=True), nn.Linear(16, 3)

        def forward(self, value):
            return self.head(self.lstm(value)[0][:, -1])

    steps = torch.randn(8, 5, 6)
    found = measure_tables(Reader().eval(), Context(data=Data(example=steps[:1], calibrate=[(steps, None)])))
    assert len(found.rows) == 5
    assert [group.names for group in found.groups] == [("lstm",)]  # both layers keep as many
    hidden = next(row for row in found.rows if row.name == "lstm.weight_hh_l1")
    assert (hidden.makes, hidden.reads) == (0, 0)
    assert hidden.treatments[0].macs == 5 * 64 * 16


def carried_out(model, context, **factors):
    """The tables of a model, and what an allocation of a tenth of its bytes, untrained, makes of it; with the allocation."""
    found = measure_tables(run(PREPARED, model, context).model, context)
    most = 0.1 * 4 * sum(value.numel() for value in model.parameters())
    allocation = solve(found.scaled(factors), {"size": most})
    recipe = recipe_of(found, allocation, Healing(0, 0), batches=1)
    return found, allocation, recipe, run(recipe, model, context).model


def test_attention_is_split_and_every_part_cut_pruned_and_rounded_by_its_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), nn.Linear(32, 3))
    steps = torch.randn(32, 5, 12)
    context = Context(data=Data(example=steps[:1], calibrate=[(steps, None)]))
    found, allocation, recipe, small = carried_out(model.eval(), context, channels=0.1, ranks=10.0, zeros=0.1)
    parts = {f"1.self_attn.{part}" for part in ("query", "key", "value", "out")}
    assert found.split
    assert parts < {row.path for row in found.rows}
    assert SplitLayers() in recipe.steps
    assert any(parts & set(group.names) for group in found.groups), "heads"
    assert min(allocation.shares) < 1
    assert any(allocation.treatments[f"{part}.weight"].density < 1 for part in parts)
    assert small(steps).shape == (32, 5, 3)
    assert Tables.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("both", [False, True])
def test_matrices_of_a_recurrent_layer_are_rounded_each_by_its_own_width(both):
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 16, 2, batch_first=True, bidirectional=both)
            self.head = nn.Linear(32 if both else 16, 3)

        def forward(self, value):
            return self.head(self.lstm(value)[0][:, -1])

    steps, model = torch.randn(32, 5, 6), Reader().eval()
    context = Context(data=Data(example=steps[:1], calibrate=[(steps, None)]))
    found = measure_tables(model, context)
    allocation = solve(found, {"size": 0.1 * 4 * sum(value.numel() for value in model.parameters())})
    widths = {row.name: 2 + place % 5 for place, row in enumerate(found.rows)}
    given = {
        name: next(one for one in next(row for row in found.rows if row.name == name).treatments if one.bits == bits)
        for name, bits in widths.items()
    }
    recipe = recipe_of(found, replace(allocation, treatments=given, shares=(1.0,) * len(found.groups)), Healing(0, 0))
    small = run(recipe, model, context).model
    ways = 2 if both else 1
    for kind, parts in (("ih", small.lstm.incoming), ("hh", small.lstm.hidden)):
        for place, part in enumerate(parts):
            name = f"lstm.weight_{kind}_l{place // ways}{'_reverse' if place % ways else ''}"
            assert part.bits == widths[name], name
    assert small.head.bits == widths["head.weight"]
    assert small(steps).shape == (32, 3)


class Recurrent(nn.Module):
    def __init__(self, kind, both):
        super().__init__()
        self.layer = kind(24, 48, 2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(96 if both else 48, 10)

    def forward(self, value):
        return self.head(self.layer(value)[0][:, -1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(24, 48), nn.Linear(48, 10)

    def forward(self, value):
        state = (value.new_zeros(len(value), 48), value.new_zeros(len(value), 48))
        for step in range(value.shape[1]):
            state = self.cell(value[:, step], state)
        return self.head(state[0])


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(Recurrent, kind, both) for kind in (nn.LSTM, nn.GRU, nn.RNN) for both in (False, True)),
        Cell,
        lambda: nn.Sequential(
            nn.Linear(24, 64), nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), nn.Linear(64, 10)
        ),
        lambda: nn.Sequential(
            nn.Conv1d(6, 48, 3, padding=1), nn.ReLU(), nn.Conv1d(48, 48, 3), nn.Flatten(), nn.Linear(48 * 22, 10)
        ),
    ],
    ids=["lstm", "lstm both", "gru", "gru both", "rnn", "rnn both", "cell", "attention", "convolution"],
)
def test_what_the_program_spends_is_what_the_weights_take_in_the_file(make):
    torch.manual_seed(0)
    model, steps = make().eval(), torch.randn(32, 6, 24)
    context = Context(data=Data(example=steps[:1], calibrate=[(steps, None)]))
    found = measure_tables(run(PREPARED, model, context).model, context)
    allocation = solve(found, {"size": 4 * sum(value.numel() for value in model.parameters()) / 12})
    small, edits = run(recipe_of(found, allocation, Healing(0, 0), batches=1), model, context)
    parts = package(small, edits, {}, None).bytes_by_part()
    spent = sum(bytes_ for name, bytes_ in parts.items() if name.endswith("codes"))
    assert spent == pytest.approx(allocation.costs["size"], rel=0.1)  # factors are not quite those of the tables


def test_channels_between_bare_parameters_have_names_and_are_cut():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3)])
            self.head = nn.Linear(16, 3)

        def forward(self, value):
            for weight in self.weights:
                value = (value @ weight).tanh()
            return self.head(value)

    torch.manual_seed(0)
    inputs = torch.randn(64, 16)
    context = Context(data=Data(example=inputs[:1], calibrate=[(inputs, None)]))
    found, allocation, _, small = carried_out(Bare().eval(), context, channels=1e-3)
    assert {group.names for group in found.groups} == {("weights",)}
    assert min(allocation.shares) < 1
    assert small.weights[0].shape[1] == small.weights[1].shape[0] < 16
