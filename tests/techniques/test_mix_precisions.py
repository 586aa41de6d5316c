"""Widths by measured damage: the program by hand, divergences by hand, and the guard."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import Write
from featherweight.layers import QuantizedLayer
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import MixPrecisions, QuantizeStatic, QuantizeWeights, spare_bits
from featherweight.techniques.damage import Damage, damage_table
from featherweight.techniques.mix_precisions import least_damage
from featherweight.zoo import small_models


def row(path, bits, weights, damage):
    return {"path": path, "treatment": str(bits), "bytes": bits * weights // 8, "damage": damage}


def test_the_least_damage_under_a_budget_by_hand():
    damages = {"a": {2: 9.0, 4: 1.0, 8: 0.0}, "b": {2: 0.3, 4: 0.2, 8: 0.0}}
    table = [row(path, bits, 80, lost) for path, each in damages.items() for bits, lost in each.items()]
    assert least_damage(table, 5.0) == {"a": 8, "b": 2}  # 0.3; 4 and 4 would cost 1.2, and 4 and 5 is not to be had
    assert least_damage(table, 4.0) == {"a": 4, "b": 4}
    assert least_damage(table, 8.0) == {"a": 8, "b": 8}
    assert least_damage(table, 2.0) == {"a": 2, "b": 2}
    assert least_damage([], 4.0) == {}


def test_divergences_by_hand():
    model = nn.Linear(1, 2, bias=False).eval()
    model.weight.data = torch.tensor([[0.0], [0.0]])
    inputs = torch.ones(3, 1)
    edit = Write({"weight": torch.tensor([[math.log(3.0)], [0.0]])})
    damage = Damage(model, Context(data=Data(example=inputs, calibrate=[inputs])), 1)
    assert damage.of(model) == 0.0
    # one half each against three quarters and one quarter
    assert damage.of_edits(model, [edit]) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert model.weight.flatten().tolist() == [0.0, 0.0]
    line = nn.Linear(1, 1, bias=False).eval()
    line.weight.data.fill_(1.0)
    values = torch.tensor([[-2.0], [2.0]])  # variance 4
    context = Context(data=Data(example=values, calibrate=[values], loss="mse"))
    table = damage_table(line, context, [("", "half", [Write({"weight": torch.tensor([[0.5]])})], 1)], 1)
    assert table == [{"path": "", "treatment": "half", "bytes": 1, "damage": 0.25}]


@pytest.mark.parametrize(
    ("batch", "enough", "read"),
    [
        ([-2.0, 2.0, -2.0, 2.0], 0.0, 5),
        ([-2.0, 2.0, -2.0, 2.0], 0.24, 5),
        ([-2.0, 2.0, -2.0, 2.0], 0.26, 2),  # each sample loses a quarter of the variance; 8 samples at least
        ([0.0, 0.0, 0.0, 4.0], 0.4, 5),  # a third, but of one sample in four: few of them leave a doubt
    ],
)
def test_batches_are_read_until_a_mean_is_surely_below_what_is_enough(batch, enough, read):
    line = nn.Linear(1, 1, bias=False).eval()
    line.weight.data.fill_(1.0)
    seen: list[int] = []

    class Loader:
        def __iter__(self):
            for place in range(5):
                seen.append(place)
                yield torch.tensor(batch)[:, None], None

    damage = Damage(line, Context(data=Data(example=torch.ones(1, 1), calibrate=Loader(), loss="mse")), 5)
    line.weight.data.fill_(0.5)
    seen.clear()
    assert damage.of(line, enough) == pytest.approx(0.25 if batch[0] else 1 / 3)
    assert len(seen) == read


def test_widths_keep_the_budget_and_differ():
    task = small_models()["plain"]
    output, _ = run(MixPrecisions(bits=3.5), task.model, Context(data=task.data))
    layers = [layer for layer in output.modules() if isinstance(layer, QuantizedLayer)]
    widths = {layer.bits for layer in layers}
    assert sum(layer.bits * layer.codes.numel() for layer in layers) <= 3.5 * sum(
        layer.codes.numel() for layer in layers
    )
    assert len(widths) > 1


def test_layers_that_hurt_fall_back_and_are_listed():
    task = small_models()["plain"]
    context = Context(data=task.data)
    loose, _ = run(QuantizeWeights(bits=2), task.model, context)
    assert context.untouched == []
    lost = Damage(task.model, context, 8).of(loose)
    guarded, _ = run(QuantizeWeights(bits=2, tolerance=lost / 4), task.model, context)
    widths = {path: layer.bits for path, layer in guarded.named_modules() if isinstance(layer, QuantizedLayer)}
    fell = {u.path for u in context.untouched}
    assert {path for path, bits in widths.items() if bits == 8} == fell
    assert 0 < len(fell) < len(widths)
    assert Damage(task.model, context, 8).of(guarded) <= lost / 4
    assert all("bytes more" in u.reason and "fell back to 8-bit weights" in u.reason for u in context.untouched)


def test_spare_bits_go_where_a_layer_costs_most_for_its_size(monkeypatch):
    damages = {"small": 8.0, "large": 9.0, "calm": 0.01}
    table = [{"path": path, "treatment": "", "bytes": 0, "damage": lost} for path, lost in damages.items()]
    monkeypatch.setattr(spare_bits, "damage_table", lambda *_: table)
    layers = [("small", nn.Linear(2, 5)), ("large", nn.Linear(6, 10)), ("calm", nn.Linear(3, 10))]
    context = Context(data=Data(example=torch.ones(1, 2)))

    def widths(spare):
        return spare_bits.spread(nn.Sequential(), context, layers, 4, spare)

    assert widths(0.0) == {"small": 4, "large": 4, "calm": 4}
    # 400 bits at 4; of 10 weights 0.8, 0.2, 0.05 and 0.0125 a weight, of 60 weights 0.15
    assert widths(0.05) == {"small": 6, "large": 4, "calm": 4}  # 20 more
    assert widths(0.2) == {"small": 6, "large": 5, "calm": 4}  # 80
    assert widths(10.0) == {"small": 8, "large": 8, "calm": 8}


def test_what_judges_compensated_rounding_was_not_read_by_it():
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    calibrate = [(torch.randn(2, 24, generator=generator), None) for _ in range(10)]
    data = Data(example=calibrate[0][0], calibrate=calibrate)
    fitted = Context(data=dataclasses.replace(data, calibrate=calibrate[:8]))
    loose, _ = run(QuantizeWeights(bits=2, rounding="compensated", batches=8), model, fitted)
    near, far = Damage(model, Context(data=data), 8).of(loose), Damage(model, Context(data=data), 10, skip=8).of(loose)
    assert near < far / 2  # so few samples are still fitted to
    context = Context(data=data)
    run(QuantizeWeights(bits=2, rounding="compensated", batches=10, tolerance=(near + far) / 2), model, context)
    assert any("fell back" in left.reason for left in context.untouched)


def test_a_tolerance_that_cannot_be_reached_is_said():
    task = small_models()["plain"]
    context = Context(data=task.data)
    output, _ = run(QuantizeStatic(tolerance=1e-12), task.model, context)
    assert not any(layer.input_grid for layer in output.modules() if isinstance(layer, QuantizedLayer))
    assert "nothing is left that could fall back" in context.untouched[-1].reason
