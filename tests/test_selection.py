"""Positives found among others, the risk worked by hand, and the samples that a label would tell most about."""

import math

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.selection import likely_positives, non_negative_risk, worth_labelling


def drawn(centre, count, seed):
    return torch.tensor(centre) + 0.5 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def test_the_risk_by_hand():
    """Sigmoid of log 3 is 3/4: positives cost a quarter, unlabelled ones 1/2 - prior * 3/4 = 1/8."""
    risk = non_negative_risk(torch.full((4,), math.log(3.0)), torch.zeros(5), 0.5)
    assert risk.item() == pytest.approx(0.5 * 0.25 + (0.5 - 0.375))


def test_a_risk_below_zero_turns_around():
    positive = torch.full((3,), 4.0, requires_grad=True)
    risk = non_negative_risk(positive, torch.full((3,), -4.0), 0.5)
    assert risk.item() > 0
    risk.backward()
    assert (positive.grad > 0).all()  # a step against the gradient makes the positives less extreme


def test_positives_are_found_in_a_pool():
    known = drawn([2.0, 2.0], 60, 0)
    pool = torch.cat([drawn([2.0, 2.0], 100, 1), drawn([-2.0, -1.0], 200, 2)])
    model = teacher()
    before = [value.clone() for value in model.parameters()]
    likely = likely_positives(model, [(known, None)], [pool[:150], pool[150:]], at=["0", "1"], prior=1 / 3)
    assert likely.shape == (300,)
    assert (likely[:100] > 0.5).float().mean() > 0.95
    assert (likely[100:] > 0.5).float().mean() < 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model[0]._forward_hooks
    again = likely_positives(model, [(known, None)], [pool], at=["0", "1"], prior=1 / 3)
    torch.testing.assert_close(again, likely)


def test_places_are_averaged():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    bright, dark = torch.rand(40, 1, 8, 8) + 1, torch.rand(40, 1, 8, 8) - 1
    likely = likely_positives(model, [bright], [torch.cat([bright, dark])], at="0", prior=0.5)
    assert (likely[:40] > 0.5).all()
    assert (likely[40:] < 0.5).all()


LOGITS = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.9, -9.0], [0.0, 0.0, 0.0], [2.0, 1.0, 1.0]])


@pytest.mark.parametrize(("strategy", "wanted"), [("entropy", [2, 3, 1]), ("margin", [2, 1, 3])])
def test_what_is_worth_a_label(strategy, wanted):
    """Entropies in nats: 0.00, 0.69, 1.10, 0.97; margins: 1.00, 0.05, 0.00, 0.36."""
    data = Data(example=LOGITS[:1])
    chosen = worth_labelling(nn.Identity(), data, [LOGITS[:2], LOGITS[2:]], 3, strategy)
    assert chosen.tolist() == wanted


def test_a_core_set_leaves_nothing_far():
    corners = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.1, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.1], [0.0, 0.0, 9.0]])
    chosen = worth_labelling(nn.Identity(), Data(example=corners[:1]), [corners], 3, "core_set")
    assert {"aabbc"[place] for place in chosen} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: likely_positives(teacher(), [torch.zeros(2, 2)], [torch.zeros(2, 2)], "0", 1.0), "prior=1.0"),
        (lambda: worth_labelling(nn.Identity(), Data(example=LOGITS[:1]), [LOGITS], 5), "budget=5"),
        (lambda: worth_labelling(nn.Identity(), Data(example=LOGITS[:1]), [LOGITS], 1, "luck"), "'luck'"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises(DataError, match=message):
        call()
