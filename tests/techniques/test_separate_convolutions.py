"""Depthwise and pointwise pairs: exact where a convolution is one, the nearest otherwise."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import SeparateConvolutions

SIZES = {nn.Conv1d: (8,), nn.Conv2d: (6, 7), nn.Conv3d: (4, 5, 4)}


def separated(layer, minimum=8):
    model = nn.Sequential(layer).eval()
    image = torch.randn(2, layer.in_channels, *SIZES[type(layer)], generator=torch.Generator().manual_seed(0))
    context = Context(data=Data(example=image))
    return run(SeparateConvolutions(minimum=minimum), model, context).model, model, image, context


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_is_a_pair_stays_what_it_is(kind, bias):
    torch.manual_seed(0)
    layer = kind(8, 12, 3, stride=2, padding=2, dilation=2, bias=bias)
    filters, columns = torch.randn(1, 8, *layer.weight.shape[2:]), torch.randn(12, 8, *[1] * len(SIZES[kind]))
    layer.weight.data = filters * columns
    output, model, image, _ = separated(layer)
    assert [type(part) for part in output[0]] == [kind, kind]
    assert output[0][0].weight.shape == (8, 1, *layer.weight.shape[2:])
    torch.testing.assert_close(output(image), model(image), rtol=1e-4, atol=1e-5)


def test_the_nearest_pair():
    """For one input channel the weights are [[3, 0], [0, 4]] over output and place: 4 stays and 3 goes."""
    layer = nn.Conv1d(1, 2, 2, bias=False)
    layer.weight.data = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]]).repeat(4, 1, 1)[:8]
    layer.out_channels = 8
    (pair,), *_ = separated(layer, minimum=1)
    rebuilt = pair[1].weight * pair[0].weight.transpose(0, 1)
    wanted = torch.tensor([[[0.0, 0.0]], [[0.0, 4.0]]]).repeat(4, 1, 1)
    torch.testing.assert_close(rebuilt, wanted)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 32, 3), "fewer than 8"),
        (nn.Conv2d(8, 32, 1), "not fewer than 256"),
        (nn.Conv2d(8, 8, 3, groups=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
    ids=str,
)
def test_what_stays_dense(layer, reason):
    output, model, _, context = separated(layer)
    assert type(output[0]) is nn.Conv2d
    assert torch.equal(output[0].weight, model[0].weight)
    assert reason in context.untouched[0].reason
