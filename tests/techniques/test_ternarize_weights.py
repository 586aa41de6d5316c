"""Ternary weights: codes and bits, the best step by hand, and zeros of pruned tensors."""

import copy
import math

import pytest
import torch
from torch import nn

from featherweight.coding import encode_tensor
from featherweight.data import Data
from featherweight.layers import QuantizedLinear
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import PruneWeights, TernarizeWeights
from featherweight.techniques.rounding import grid_scale


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    inputs = drawn(320, 8)
    batches = [(inputs[at : at + 32], inputs[at : at + 32, :4].argmax(1)) for at in range(0, 320, 32)]
    return model, Data(example=inputs[:2], train=batches, calibrate=batches, validate=batches)


def trained(recipe):
    model, data = task()
    context = Context(data=data, teacher=copy.deepcopy(model))
    return run(recipe, model, context).model, context


def test_the_best_step_by_hand():
    """0.9 and 1.1 become the step, 0.1 zero: its best value is their mean; on a row of noughts it is no error."""
    weight = torch.tensor([[0.9, -1.1, 0.1, -0.1], [0.0, 0.0, 0.0, 0.0]])
    assert grid_scale(weight, 2, per_channel=True)[0].item() == pytest.approx(1.0, abs=0.01)


def test_codes_of_at_most_log_three_bits():
    output, _ = trained(TernarizeWeights(epochs=2, learning_rate=5e-3))
    inner = output[2]
    assert type(inner) is QuantizedLinear
    assert sorted(inner.codes.unique().tolist()) == [-1, 0, 1]
    assert inner.scale.shape == (64,)
    assert (output[0].bits, output[4].bits) == (8, 8)
    assert 8 * len(encode_tensor(inner.codes)) <= 1.01 * math.log2(3) * inner.codes.numel()


def test_zeros_of_pruned_tensors_stay():
    recipe = Recipe((PruneWeights(ratio=0.6, ranking="layer"), TernarizeWeights(epochs=2, learning_rate=1e-2)))
    output, context = trained(recipe)
    pruned, _ = trained(recipe.parts[0])
    assert "2.weight" in context.sparse
    assert not output[2].codes[pruned[2].weight == 0].any()
    assert output[2].codes.any()
