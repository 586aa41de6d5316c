"""Optimal brain surgeon over units: the errors are those that removing and refitting really leaves."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.graph import coupled_groups
from featherweight.technique import Context
from featherweight.techniques.surgeon import removal_errors


def correlated(samples, width, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=draw) @ torch.randn(width, width, generator=draw)


def context(inputs):
    return Context(data=Data(example=inputs[:1], calibrate=[(inputs, torch.zeros(len(inputs), dtype=torch.long))]))


def residual(features, kept, wanted):
    """Mean squared output error of the best linear map from the kept features."""
    fitted = torch.linalg.lstsq(features[:, kept], wanted).solution
    return float((features[:, kept] @ fitted - wanted).square().sum() / len(wanted))


def test_the_first_to_leave_costs_what_least_squares_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    inputs = correlated(400, 6, 1)
    groups, _ = coupled_groups(model, (inputs[:2],))
    (errors,) = removal_errors(model, groups, context(inputs), 1)
    with torch.no_grad():
        features = model[1](model[0](inputs)).double()
        wanted = features @ model[2].weight.double().T
    alone = [residual(features, [i for i in range(5) if i != unit], wanted) for unit in range(5)]
    first = int(torch.tensor(alone).argmin())
    assert int(errors.argmin()) == first
    assert float(errors[first]) == pytest.approx(alone[first], rel=0.1)
    assert float(errors.sum()) == pytest.approx(float(wanted.square().sum() / len(wanted)), rel=0.02)


class Beside(nn.Module):
    """Twelve units between inputs that the same layer reads, before and behind them."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(18, 3)

    def features(self, x):
        return torch.cat((x[:, :4], self.inner(x).relu(), x[:, 4:]), 1)

    def forward(self, x):
        return self.outer(self.features(x))


def test_each_that_leaves_costs_what_least_squares_says_in_the_order_in_which_it_costs_least():
    torch.manual_seed(0)
    model, inputs = Beside().eval(), correlated(800, 6, 1)
    groups, _ = coupled_groups(model, (inputs[:2],))
    (group,) = (group for group in groups if len(group) == 12)
    (errors,) = removal_errors(model, [group], context(inputs), 1)
    with torch.no_grad():
        features = model.features(inputs).double()
    moment = features.T @ features / len(features)
    ridged = moment + 1e-3 * moment.diagonal().mean() * torch.eye(18)
    seen = torch.linalg.cholesky(ridged).T  # whose second moment is that
    wanted = seen @ model.outer.weight.detach().double().T
    left, lost, gone = list(range(18)), 0.0, []
    for _ in range(12):
        alone = {
            unit: len(seen) * residual(seen, [i for i in left if i != unit + 4], wanted)
            for unit in range(12)
            if unit not in gone
        }
        unit = min(alone, key=alone.__getitem__)
        assert float(errors[unit]) == pytest.approx(alone[unit] - lost, rel=1e-4)
        left.remove(unit + 4)
        gone, lost = [*gone, unit], alone[unit]


def test_a_unit_that_copies_another_costs_nothing_and_only_one_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    groups, _ = coupled_groups(model, (images[:2],))
    (errors,) = removal_errors(model, groups, context(images), 1)
    cheap = errors < 1e-2 * errors.max()
    assert int(cheap.sum()) == 1
    assert bool(cheap[0] | cheap[2])


def test_errors_behind_a_batch_norm_are_on_its_scale():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3)]
    model = nn.Sequential(*layers).eval()
    inputs = correlated(200, 6, 1)
    groups, _ = coupled_groups(model, (inputs[:2],))
    (plain,) = removal_errors(model, groups, context(inputs), 1)
    model[3].weight.data.fill_(10.0)
    (scaled,) = removal_errors(model, groups, context(inputs), 1)
    torch.testing.assert_close(scaled, 100 * plain)


def test_a_group_that_nothing_dense_reads_has_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).eval()
    model = nn.Sequential(model, nn.ConvTranspose2d(4, 2, 1)).eval()
    images = torch.randn(2, 3, 4, 4)
    groups, _ = coupled_groups(model, (images,))
    assert removal_errors(model, groups, context(images), 1) == [None]
