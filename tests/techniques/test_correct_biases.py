"""Bias correction: means by hand, and less error after rough rounding."""

import copy

import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import CorrectBiases, EqualizeLayers, FoldBatchNorm, QuantizeWeights
from featherweight.zoo import small_models


def test_a_shift_goes_back_through_the_bias():
    original = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).eval()
    for layer in original:
        layer.weight.data.fill_(1.0)
        layer.bias.data.zero_()
    changed = copy.deepcopy(original)
    changed[0].weight.data.fill_(1.25)
    inputs = torch.tensor([[1.0], [3.0]])
    context = Context(data=Data(example=inputs, calibrate=[inputs]), teacher=original)
    output, edits = run(CorrectBiases(), changed, context)
    assert output[0].bias.item() == -0.5  # the mean was 2 and became 2.5
    assert output[1].bias.item() == 0.0  # which the first layer has made good
    assert len(edits) == 2
    assert not any(module._forward_hooks for model in (original, output) for module in model.modules())


def test_behind_a_folded_norm_the_norm_is_what_counts():
    task = small_models()["plain"]
    inputs, gaps = task.data.validate[0][0], []
    rough = Recipe((FoldBatchNorm(), QuantizeWeights(bits=3)))
    for recipe in (rough, rough + CorrectBiases()):
        context = Context(data=task.data, teacher=task.model)
        output, _ = run(recipe, task.model, context)
        assert context.untouched == []
        with torch.no_grad():
            gaps.append(float((output(inputs) - task.model(inputs)).mean(0).square().sum()))
    assert gaps[1] < gaps[0] / 2


def test_layers_on_another_scale_are_left():
    task = small_models()["perceptron"]
    scaled = copy.deepcopy(task.model)
    first = next(module for module in scaled.modules() if isinstance(module, nn.Linear))
    first.weight.data *= 50
    first.bias.data *= 50
    context = Context(data=task.data, teacher=task.model)
    run(Recipe((CorrectBiases(),)), scaled, context)
    assert "another scale" in context.untouched[0].reason
    context = Context(data=task.data)
    _, edits = run(EqualizeLayers() + CorrectBiases(), task.model, context)
    assert len(edits) == 1
    assert "no original" in context.untouched[-1].reason
