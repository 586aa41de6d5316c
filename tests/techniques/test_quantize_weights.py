"""Weight codes: ranges, steps, error bounds, and layers that are not touched."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.layers import QuantizedConv, QuantizedLinear
from featherweight.layers.quantized import fake_quantize, limit, round_mantissa
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import QuantizeWeights
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.zoo import small_models


def quantize(model, example, **settings):
    context = Context(data=Data(example=example))
    output, _ = run(QuantizeWeights(**settings), model.eval(), context)
    return output, context


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_scales_and_error_bound(bits, per_channel):
    task = small_models()["plain"]
    output, _ = quantize(task.model, task.data.example, bits=bits, per_channel=per_channel)
    layer, new, high = task.model.hidden, output.hidden, 2 ** (bits - 1) - 1
    assert new.codes.dtype == torch.int8
    assert new.codes.shape == layer.weight.shape
    assert int(new.codes.abs().max()) <= high
    assert new.scale.shape == ((16,) if per_channel else (1,))
    step = new.scale.reshape(-1, 1)
    inside = layer.weight.abs() <= high * step
    error = (new.codes * step - layer.weight).abs()
    assert bool((error <= step / 2 * 1.0001)[inside].all())
    assert torch.equal(new.dequantized(), new.codes * step)
    assert all(new.scale == round_mantissa(new.scale, 8 if bits <= 6 else 12))


def test_a_weight_on_the_grid_comes_back_exactly():
    weight = torch.tensor([[-7.0, 3.0, 0.0, 1.0], [7.0, 7.0, -2.0, 5.0]]) / 8
    scale = grid_scale(weight, 4, per_channel=True)
    assert scale.tolist() == [0.125, 0.125]
    assert to_codes(weight, scale, 4).tolist() == [[-7, 3, 0, 1], [7, 7, -2, 5]]


def test_the_step_clips_an_outlier_where_that_costs_less():
    weight = torch.full((1, 1000), 0.1)
    weight[0, 0] = 0.4
    assert grid_scale(weight, 2, per_channel=True).item() == pytest.approx(0.1, rel=0.02)


def test_zeros_stay_zero_and_an_empty_row_is_no_error():
    weight = torch.zeros(2, 4)
    weight[0, 1] = 0.3
    scale = grid_scale(weight, 4, per_channel=True)
    assert bool((scale > 0).all())
    assert to_codes(weight, scale, 4)[0].tolist() == [0, 7, 0, 0]
    assert not to_codes(weight, scale, 4)[1].any()


def test_more_bits_are_closer():
    task = small_models()["residual"]
    inputs = task.data.validate[0][0]
    gaps = []
    for bits in (2, 4, 8):
        output, _ = quantize(task.model, inputs, bits=bits)
        with torch.no_grad():
            gaps.append(float((output(inputs) - task.model(inputs)).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_convolution_geometry_survives():
    generator = torch.Generator().manual_seed(0)
    for layer, shape in (
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(1, 2), bias=False), (2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 3, padding="same"), (2, 2, 4, 4, 4)),
    ):
        example = torch.randn(shape, generator=generator)
        output, _ = quantize(nn.Sequential(layer), example, bits=8)
        assert type(output[0]) is QuantizedConv
        with torch.no_grad():
            assert torch.allclose(output(example), layer(example), atol=0.02)


def test_what_is_left_alone():
    task = small_models()["transformer"]
    output, context = quantize(task.model, task.data.example)
    assert type(output.head) is nn.Linear
    assert output.head.weight is output.embedding.weight
    assert [(u.path, "tied" in u.reason) for u in context.untouched] == [("head", True)]
    _, context = quantize(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), torch.ones(1, 1, 4, 4))
    assert "circular" in context.untouched[0].reason


def test_a_module_registered_twice_is_swapped_once():
    task = small_models()["twice"]
    output, _ = quantize(task.model, task.data.example)
    assert type(output.first) is QuantizedLinear
    assert output.first is output.again


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_thaw_and_freeze_change_nothing(bits):
    task = small_models()["plain"]
    output, _ = quantize(task.model, task.data.example, bits=bits)
    before = {name: value.clone() for name, value in output.state_dict().items()}
    inputs = task.data.validate[0][0]
    wanted = output(inputs)
    for layer in (output.hidden, output.features[3]):
        layer.thaw()
        assert layer.weight.requires_grad
        assert layer.scale.requires_grad
    assert torch.equal(output(inputs), wanted), "a thawed layer computes in evaluation mode what it will freeze to"
    for layer in (output.hidden, output.features[3]):
        layer.freeze()
    assert list(output.state_dict()) == list(before) or set(output.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in output.state_dict().items())


def test_straight_through_gradients_by_hand():
    values = torch.tensor([0.3, 5.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    rounded = fake_quantize(values, scale, -limit(3), limit(3), 1.0)
    assert rounded.tolist() == [0.0, 3.0]
    rounded.sum().backward()
    assert values.grad.tolist() == [1.0, 0.0]  # inside passes, clipped does not
    assert scale.grad.item() == pytest.approx(-0.3 + 3.0)  # round(v) - v inside, the bound outside
