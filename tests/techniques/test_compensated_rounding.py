"""Codes that keep outputs: the loop over columns, descent and least squares by hand, and how much better whole networks are."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.layers import build
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import FoldBatchNorm, QuantizeWeights
from featherweight.techniques.compensated_rounding import Goal, fitted, least_squares
from featherweight.techniques.compensation import compensate
from featherweight.techniques.moments import inverse_factor
from featherweight.techniques.paired import Pair, Pairs, Wave, waves
from featherweight.zoo import small_models


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_at(path, original, changed, context):
    wave = Wave((path,))
    with Pairs(original, changed, context, [wave], 1) as pairs:
        return pairs.at(wave)[path]


def goal(rows, second, high=7):
    return Goal(rows, second, torch.zeros_like(rows, dtype=torch.bool), -high, high)


def test_what_one_column_loses_the_next_takes_over():
    """Two inputs that are nearly the same: what rounding takes from the first weight goes to the second."""
    second = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=torch.float64)
    matrix = torch.tensor([[[0.4, 0.4]]], dtype=torch.float64)
    compensate(matrix, inverse_factor(second, 0.0), lambda column, values: values.round())
    # the optimum of the second given a loss of 0.4 in the first is 0.4 + 0.9 * 0.4 = 0.76
    assert matrix.tolist() == [[[0.0, 1.0]]]


def test_columns_in_blocks_are_columns_one_by_one():
    inputs = draw(50, 9)
    second, weight = (inputs.T @ inputs / 50)[None], draw(1, 4, 9, seed=1)
    found = []
    for block in (1, 4, 128):
        matrix = weight.clone()
        compensate(matrix, inverse_factor(second, 0.01), lambda _, values: values.round(), block)
        found.append(matrix)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_descent_finds_what_is_best_for_one_code_at_a_time():
    inputs = draw(60, 6)
    made = goal(draw(1, 3, 6, seed=1) * 2, (inputs.T @ inputs / 60)[None])
    steps = torch.full((1, 3, 1), 0.5, dtype=torch.float64)
    nearest = (made.target / steps).round().clamp(-7, 7)
    compensated = made.rounded(steps)
    codes = compensated
    for _ in range(20):
        codes = made.descended(codes, steps)
    assert made.cost(codes, steps) <= made.cost(compensated, steps) < made.cost(nearest, steps)
    for row in range(3):
        for column in range(6):
            for change in (-1, 1):
                other = codes.clone()
                other[0, row, column] += change
                assert made.cost(other, steps) >= made.cost(codes, steps) or other.abs().max() > 7


def test_held_zeros_stay_and_scales_are_refitted():
    inputs = draw(60, 6)
    target = draw(1, 3, 6, seed=1)
    held = torch.zeros_like(target, dtype=torch.bool)
    held[0, :, 2] = True
    made = Goal(target.masked_fill(held, 0.0), (inputs.T @ inputs / 60)[None], held, -7, 7)
    steps = torch.full((1, 3, 1), 0.4, dtype=torch.float64)
    codes = made.descended(made.rounded(steps), steps)
    assert not codes[0, :, 2].any()
    scale = made.refitted(codes, torch.full((3,), 0.4))
    assert made.cost(codes, scale.double().reshape(1, 3, 1)) <= made.cost(codes, steps)
    exact = goal(torch.tensor([[[2.0, -4.0, 6.0]]], dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None])
    codes = torch.tensor([[[1.0, -2.0, 3.0]]], dtype=torch.float64)
    assert exact.refitted(codes, torch.tensor([1.0])).tolist() == [2.0]


def test_a_layer_makes_good_for_what_happened_before_it():
    """Its input became half of what it was: the weight doubles, and the bias takes the shift."""
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(1.0)
    layer.bias.data.fill_(0.5)
    inputs = torch.linspace(-1, 1, 101, dtype=torch.float64)
    changed = inputs / 2 + 3
    moments = [inputs.mean(), changed.mean(), (changed * changed).mean(), (inputs * changed).mean()]
    pair = Pair(*(m.reshape(1, 1) for m in moments[:2]), *(m.reshape(1, 1, 1) for m in moments[2:]))
    fresh = build("quantized_linear", {"in_features": 1, "out_features": 1, "bits": 7})
    found = fitted(layer, fresh, pair, sparse=False)
    assert (found.codes * found.scale).item() == pytest.approx(2.0, rel=0.02)  # but for the damping
    given = changed * (found.codes * found.scale).item() + found.bias.item()
    assert given == pytest.approx((inputs + 0.5).numpy(), abs=0.02)


def test_few_samples_are_not_fitted_closely():
    layer = nn.Linear(64, 16)
    layer.weight.data = draw(16, 64, seed=1).float()
    inputs, fresh_inputs = draw(6, 64, seed=2).float(), draw(400, 64, seed=3).float()
    model = nn.Sequential(layer)
    context = Context(data=Data(example=inputs[:1], calibrate=[inputs]))
    pair = moments_at("0", model, copy.deepcopy(model), context)
    assert pair.samples == 6
    kind, errors = build("quantized_linear", {"in_features": 64, "out_features": 16, "bits": 3}), []
    for seen in (pair, dataclasses.replace(pair, samples=64)):
        found = fitted(layer, kind, seen, sparse=False)
        lost = layer.weight.detach() - found.codes.float() * found.scale[:, None]
        errors.append(float((fresh_inputs @ lost.T).square().mean()))
    assert errors[0] < errors[1]


def test_a_weight_moves_less_towards_what_fewer_samples_say():
    """Inputs became half of what they were: the weight goes to 2, from few samples only part of the way."""
    rows, second, cross = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (1.0, 0.25, 0.5))
    many, two, one = (float(least_squares(rows, second, cross, samples)) for samples in (10_000, 2, 1))
    assert many == pytest.approx(2.0, abs=1e-3)
    assert two == pytest.approx(0.5625 / 0.3125)
    assert one == pytest.approx(0.625 / 0.375)


def test_moments_of_both_models_by_hand():
    original, changed = (
        nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1)),
        nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1)),
    )
    original[0].weight.data.fill_(1.0)
    changed[0].weight.data.fill_(2.0)
    context = Context(data=Data(example=torch.ones(1, 1), calibrate=[torch.tensor([[1.0], [3.0]]), torch.ones(9, 1)]))
    pair = moments_at("1", original, changed, context)
    assert (pair.mean.item(), pair.changed.item()) == (2.0, 4.0)
    assert (pair.second.item(), pair.cross.item()) == (20.0, 10.0)
    second, cross = pair.centred()
    assert (second.item(), cross.item()) == (4.0, 2.0)
    assert not any("forward" in vars(module) for model in (original, changed) for module in model.modules())


def test_layers_that_read_one_tensor_come_together():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.left, self.right, self.unused = (nn.Linear(2, 2) for _ in range(4))

        def forward(self, x):
            return self.last(self.left(x) + self.right(x))

    context = Context(data=Data(example=torch.ones(1, 2)))
    assert waves(Parallel(), context, ["last", "left", "right", "unused"]) == [
        Wave(("left", "right")),
        Wave(("last",)),
    ]


def noise(task, *recipe):
    output, _ = run(Recipe((FoldBatchNorm(), *recipe)), task.model, Context(data=task.data))
    inputs = task.data.validate[0][0]
    with torch.no_grad():
        wanted = task.model(inputs)
        return float((output(inputs) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "transformer"])
def test_outputs_of_low_bit_networks_are_nearer(name):
    task = small_models()[name]
    nearest = noise(task, QuantizeWeights(bits=4))
    assert noise(task, QuantizeWeights(bits=4, rounding="compensated")) < 0.9 * nearest
