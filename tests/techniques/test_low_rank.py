"""Factorization: known ranks come back exactly, and what would grow is left and listed."""

import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import LowRank


def factor(model, example, **settings):
    context = Context(data=Data(example=example))
    output, edits = run(LowRank(**settings), model.eval(), context)
    return output, edits, context


def of_rank(rank, rows, columns):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def test_a_matrix_of_rank_two_comes_back():
    model = nn.Sequential(nn.Linear(20, 16))
    model[0].weight.data = of_rank(2, 16, 20)
    output, _, _ = factor(model, torch.ones(2, 20), energy=0.999999)
    assert output[0][0].weight.shape == (2, 20)
    assert output[0][1].weight.shape == (16, 2)
    assert torch.allclose(output[0][1].weight @ output[0][0].weight, model[0].weight, atol=1e-5)
    assert torch.equal(output[0][1].bias, model[0].bias)
    assert output[0][0].bias is None


def test_energy_chooses_the_rank():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight.data = torch.diag(
        torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    )  # energies 16, 4, 1, 1 of 22
    for energy, rank in ((0.7, 1), (0.72, 1), (0.73, 2), (0.9, 2), (0.95, 3), (0.96, None)):
        output, edits, context = factor(model, torch.ones(2, 8), energy=energy)
        if rank is None:  # rank 4 would take 4 * 16 = 64 weights, no fewer
            assert not edits
            assert "rank 4" in context.untouched[0].reason
        else:
            assert output[0][0].out_features == rank, energy


def test_multiple_rounds_the_rank_up():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].weight.data = of_rank(3, 32, 32)
    output, _, _ = factor(model, torch.ones(2, 32), energy=0.999999, multiple=4)
    assert output[0][0].out_features == 4


def test_convolutions_of_every_dimension():
    for layer, shape in (
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
        (nn.Conv2d(6, 8, (3, 1), dilation=2, bias=False), (2, 6, 9, 9)),
        (nn.Conv3d(4, 8, 3, padding="same"), (2, 4, 4, 4, 4)),
    ):
        layer.weight.data = of_rank(2, 8, layer.weight[0].numel()).reshape(layer.weight.shape)
        example = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        output, edits, _ = factor(nn.Sequential(layer), example, energy=0.999999)
        assert len(edits) == 1
        with torch.no_grad():
            assert torch.allclose(output(example), layer(example), atol=1e-4)


def test_what_is_left_and_why():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    for model, example, reason in (
        (nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), "would not be smaller"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)), torch.ones(2, 8, 4, 4), "grouped"),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), torch.ones(2, 8, 4, 4), "padded"),
        (tied, torch.ones(2, 8), "tied"),
    ):
        output, edits, context = factor(model, example, energy=0.95)
        assert not edits
        assert reason in context.untouched[0].reason
        assert context.untouched[0].path == "0"
        assert torch.equal(output(example), model(example))


def test_a_weight_of_zeros_is_no_error():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data.zero_()
    output, _, _ = factor(model, torch.ones(2, 8))
    assert torch.equal(output(torch.ones(2, 8)), model(torch.ones(2, 8)))
