"""Batch norm statistics: averages over calibration batches, or the original's, moved; and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import ReestimateNorms


def reestimate(model, calibrate, step=None):
    context = Context(data=Data(example=calibrate[0][:1], calibrate=calibrate))
    output, edits = run(step or ReestimateNorms(), model, context)
    return output, edits, context


def test_the_statistics_are_the_averages_over_batches():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, momentum=0.3)).eval()
    model[0].weight.data = torch.eye(2)
    batches = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[4.0, 5.0], [4.0, 9.0]])]
    output, edits, _ = reestimate(model, batches)
    assert len(edits) == 1
    assert output[1].running_mean.tolist() == [2.5, 4.5]  # of 1 and 4, and of 2 and 7
    assert output[1].running_var.tolist() == [1.0, 5.0]  # of 2 and 0, and of 2 and 8
    assert output[1].momentum == 0.3
    assert output[1].num_batches_tracked == model[1].num_batches_tracked
    assert not any(module.training for module in output.modules())
    assert model[1].running_mean.tolist() == [0.0, 0.0]


def test_norms_see_the_statistics_of_the_norms_before_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
    ).eval()
    images = [torch.randn(8, 1, 4, 4) * 5 + 3]
    output, _, _ = reestimate(model, images)
    with torch.no_grad():
        values = output(images[0])
    assert torch.allclose(values.mean((0, 2, 3)), torch.zeros(2), atol=1e-2)
    assert torch.allclose(values.var((0, 2, 3)), torch.ones(2), atol=1e-2)


def test_only_in_scope():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    output, _, _ = reestimate(model, [torch.randn(4, 2) + 7], only("1", ReestimateNorms()))
    assert torch.equal(output[0].running_mean, torch.zeros(2))
    assert float(output[1].running_mean.min()) > 5


def test_how_many_batches_are_read():
    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    batches = [torch.full((2, 1), 1.0), torch.full((2, 1), 9.0)]
    output, _, _ = reestimate(model, batches, ReestimateNorms(batches=1))
    assert output[0].running_mean.tolist() == [1.0]


def test_a_model_without_norms_and_a_norm_without_statistics_are_told():
    _, edits, context = reestimate(nn.Sequential(nn.Linear(2, 2)), [torch.randn(4, 2)])
    assert not edits
    assert "no batch norm" in context.untouched[0].reason
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).eval()
    _, edits, context = reestimate(model, [torch.randn(4, 2)])
    assert not edits
    assert context.untouched[0].path == "0"


class Spare(nn.Module):
    """One of its norms is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, values):
        return self.used(values)


def test_a_norm_that_no_data_reaches_keeps_its_statistics():
    model = Spare().eval()
    model.spare.running_mean += 3
    output, _, context = reestimate(model, [torch.randn(4, 2) + 7])
    assert output.spare.running_mean.tolist() == [3.0, 3.0]
    assert float(output.used.running_mean.min()) > 5
    assert [left.path for left in context.untouched] == ["spare"]


def test_batches_of_one_sample_are_passed_over_and_refused_when_there_is_nothing_else():
    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    output, _, _ = reestimate(model, [torch.full((2, 1), 4.0), torch.full((1, 1), 100.0)])
    assert output[0].running_mean.tolist() == [4.0]
    with pytest.raises(DataError, match="one sample"):
        reestimate(model, [torch.ones(1, 1)])


def relative(model, teacher, batches, step=None):
    context = Context(data=Data(example=batches[0][:1], calibrate=batches), teacher=teacher)
    return run(step or ReestimateNorms(), model, context).model


def normed(features=3):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, features, bias=False), nn.BatchNorm1d(features)).eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(0.5, 2)
    return model


def test_a_model_that_did_not_change_keeps_its_statistics_to_rounding():
    model, images = normed(), [torch.randn(64, 4) * 3 + 1]
    kept = relative(copy.deepcopy(model), model, images)
    assert torch.allclose(kept[1].running_mean, model[1].running_mean, atol=1e-5)
    assert torch.allclose(kept[1].running_var, model[1].running_var, rtol=1e-5)
    fresh = relative(copy.deepcopy(model), model, images, ReestimateNorms(relative=False))
    assert not torch.allclose(fresh[1].running_mean, model[1].running_mean, atol=0.1)


def test_rows_that_shrank_and_moved_give_what_the_original_gives():
    original, images = normed(), [torch.randn(256, 4) * 3 + 1]
    model = nn.Sequential(nn.Linear(4, 3), copy.deepcopy(original[1])).eval()
    with torch.no_grad():
        model[0].weight.copy_(original[0].weight * torch.tensor([[0.5], [2.0], [0.1]]))
        model[0].bias.copy_(torch.tensor([1.0, -2.0, 0.3]))
        model[1].running_mean.add_(5)  # what it has itself is not asked
        output = relative(model, original, images)
        assert torch.allclose(output(images[0]), original(images[0]), atol=1e-3)


def test_a_channel_that_is_always_the_same_is_left_on_its_scale():
    original = normed()
    with torch.no_grad():
        original[0].weight[1] = 0
        original[1].running_var[1] = 1e-12
    kept = relative(copy.deepcopy(original), original, [torch.randn(64, 4)])
    assert torch.allclose(kept[1].running_var[1], torch.tensor(0.0), atol=1e-6)
    assert torch.isfinite(kept[1].running_mean).all()


def test_norms_that_were_cut_take_the_averages():
    images = [torch.randn(64, 4) + 2]
    found = relative(normed(2), normed(3), images)
    plain = relative(normed(2), None, images)
    assert torch.equal(found[1].running_mean, plain[1].running_mean)
