"""Weights drawn anew: layers by their own initialisation, loose parameters by their moments, the form kept."""

import math

import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import QuantizeWeights, Reinitialize

DATA = Data(example=torch.ones(1, 4))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 400)
        self.norm = nn.BatchNorm1d(400)
        self.shift = nn.Parameter(
            torch.full((4000,), 7.0).addcmul_(torch.ones(4000), torch.tensor([-1.0, 1.0]).repeat(2000))
        )

    def forward(self, x):
        return self.norm(self.linear(x)) + self.shift[:400]


def model():
    made = Scaled().eval()
    with torch.no_grad():
        made.linear.weight.fill_(9.0)
        made.norm.weight.fill_(3.0)
        made.norm.running_mean.fill_(5.0)
    return made


def draw(step=None, seed=0):
    return run(step or Reinitialize(), model(), Context(data=DATA, seed=seed)).model.requires_grad_(False)


def test_layers_are_drawn_by_their_own_rule():
    """A linear layer of 4 inputs: uniform up to 1 / sqrt(4); a norm: scale 1 and statistics of nothing."""
    drawn = draw()
    assert 0.45 < float(drawn.linear.weight.abs().max()) <= 0.5
    assert abs(float(drawn.linear.weight.std()) - 0.5 / math.sqrt(3)) < 0.02
    assert drawn.norm.weight.tolist() == [1.0] * 400
    assert drawn.norm.running_mean.tolist() == [0.0] * 400


def test_a_loose_parameter_keeps_its_moments():
    """7 plus and minus 1."""
    drawn = draw()
    assert abs(float(drawn.shift.mean()) - 7) < 0.1
    assert abs(float(drawn.shift.std()) - 1) < 0.05
    assert set(drawn.shift.round().tolist()) != {6.0, 8.0}


def test_the_seed_decides():
    assert torch.equal(draw(seed=1).linear.weight, draw(seed=1).linear.weight)
    assert not torch.equal(draw(seed=1).linear.weight, draw(seed=2).linear.weight)


def test_scope_and_quantized_layers_are_left():
    assert draw(only("norm", Reinitialize())).linear.weight.eq(9).all()
    quantized = run(QuantizeWeights(bits=8), model(), Context(data=DATA)).model
    again = run(Reinitialize(), quantized, Context(data=DATA)).model
    assert torch.equal(again.linear.codes, quantized.linear.codes)
