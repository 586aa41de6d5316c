"""Folding: the same function to rounding, the norm gone, and nothing folded that must not be."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import FoldBatchNorm, fold_batch_norm
from featherweight.zoo import randomise, small_models


def fold(model, example, technique=None):
    context = Context(data=Data(example=example))
    output, edits = run(technique or FoldBatchNorm(), randomise(model, 3).eval(), context)
    return output, edits, context


def same(model, output, example):
    with torch.no_grad():
        return torch.allclose(model(example), output(example), atol=1e-5)


def test_a_model_without_norms_is_not_traced(monkeypatch):
    monkeypatch.setattr(fold_batch_norm, "norm_pairs", lambda *given: pytest.fail("traced"))
    _, edits, context = fold(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2))
    assert (edits, context.untouched) == ([], [])


def test_by_hand():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.0)).eval()
    model.load_state_dict(
        {
            "0.weight": torch.tensor([[2.0]]),
            "0.bias": torch.tensor([1.0]),
            "1.weight": torch.tensor([3.0]),
            "1.bias": torch.tensor([0.5]),
            "1.running_mean": torch.tensor([4.0]),
            "1.running_var": torch.tensor([4.0]),
            "1.num_batches_tracked": torch.tensor(1),
        }
    )
    output, _ = run(FoldBatchNorm(), model, Context(data=Data(example=torch.ones(1, 1))))
    assert output[0].weight.item() == 3.0  # 2 * 3 / 2
    assert output[0].bias.item() == -4.0  # (1 - 4) * 3 / 2 + 0.5
    assert type(output[1]) is nn.Identity


def test_every_norm_of_the_zoo_goes():
    for name in ("plain", "residual", "branches"):
        task = small_models()[name]
        context = Context(data=task.data)
        output, _ = run(FoldBatchNorm(), task.model, context)
        assert not [m for m in output.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)], name
        assert not context.untouched
        assert same(task.model, output, task.data.train[0][0])


def test_dimensions_and_groups():
    for build, norm, shape in (
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv3d(2, 3, 2, stride=2, bias=False), nn.BatchNorm3d(3, affine=False), (2, 2, 4, 4, 4)),
    ):
        model, example = nn.Sequential(build, norm), torch.randn(shape, generator=torch.Generator().manual_seed(0))
        output, edits, _ = fold(model, example)
        assert len(edits) == 2
        assert same(model, output, example)


def test_double_stays_double():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    example = torch.ones(2, 3, dtype=torch.float64)
    output, edits, _ = fold(model, example)
    assert len(edits) == 2
    assert output[0].weight.dtype == torch.float64
    assert torch.allclose(model(example), output(example), atol=1e-12)


class Odd(nn.Module):
    """A norm whose layer has a second reader."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


def test_what_is_left_alone_and_why():
    image = torch.ones(2, 2, 4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    shared = nn.Linear(4, 4)
    for model, example, reason in (
        (Odd(), image, "feeds it alone"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(2)), image, "pads"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), image, "feeds it alone"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), image, ""),
        (tied, torch.ones(2, 4), "tied"),
        (nn.Sequential(shared, nn.BatchNorm1d(4), shared), torch.ones(2, 4), "feeds it alone"),
    ):
        output, edits, context = fold(model, example)
        assert not edits
        assert reason in context.untouched[0].reason
        assert same(model, output, example)


def test_a_layer_out_of_scope_keeps_its_weight():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    _, edits, context = fold(model, torch.ones(2, 2, 4, 4), only("1", FoldBatchNorm()))
    assert not edits
    assert "out of scope" in context.untouched[0].reason
