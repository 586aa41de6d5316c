"""Cross-layer equalization: factors by hand, and functions that stay."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import EqualizeLayers, FoldBatchNorm, QuantizeWeights
from featherweight.techniques.links import Link, links, multiplied, reach
from featherweight.zoo import small_models


def test_two_layers_meet_in_the_middle():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    model[0].weight.data = torch.tensor([[8.0], [1.0]])
    model[0].bias.data = torch.tensor([4.0, 1.0])
    model[2].weight.data = torch.tensor([[2.0, 9.0]])
    output, edits = run(EqualizeLayers(), model, Context(data=Data(example=torch.ones(1, 1))))
    # ranges 8 and 2 meet at 4, 1 and 9 at 3
    assert output[0].weight.flatten().tolist() == [4.0, 3.0]
    assert output[0].bias.tolist() == [2.0, 3.0]
    assert output[2].weight.flatten().tolist() == [4.0, 3.0]
    assert len(edits) == 1
    inputs = torch.linspace(-3, 3, 9)[:, None]
    assert torch.allclose(output(inputs), model(inputs), atol=1e-5)


def test_channels_of_grouped_convolutions():
    weight = torch.arange(1.0, 9.0).reshape(4, 2, 1, 1)  # two groups of two outputs and two inputs
    assert reach(weight, 4).tolist() == [3.0, 4.0, 7.0, 8.0]
    moved = multiplied(weight, torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert moved.flatten().tolist() == [1.0, 20.0, 3.0, 40.0, 500.0, 6000.0, 700.0, 8000.0]


def test_links_end_where_channels_go_elsewhere():
    task = small_models()["residual"]
    folded, _ = run(FoldBatchNorm(), task.model, Context(data=task.data))
    found = links(folded, Context(data=task.data))
    linked = [link for link in found if link.producer is not None]
    assert linked == [Link("first.conv1", ("first.conv2",)), Link("second.conv1", ("second.conv2",))]
    alone = [path for link in found if link.producer is None for path in link.consumers]
    assert alone == [path for path, layer in folded.named_modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("name", ["plain", "residual", "perceptron"])
def test_the_function_stays(name):
    task = small_models()[name]
    context = Context(data=task.data)
    folded, _ = run(FoldBatchNorm(), task.model, context)
    output, edits = run(EqualizeLayers(), folded, context)
    inputs = task.data.validate[0][0]
    with torch.no_grad():
        assert torch.allclose(output(inputs), folded(inputs), atol=1e-4)
    assert edits


def test_one_scale_a_tensor_is_enough_afterwards():
    task = small_models()["perceptron"]
    first = next(module for module in task.model.modules() if isinstance(module, nn.Linear))
    first.weight.data[::2] *= 20
    first.bias.data[::2] *= 20
    quantize, gaps = QuantizeWeights(bits=4, per_channel=False), []
    inputs = task.data.validate[0][0]
    for recipe in (quantize, Recipe((EqualizeLayers(), quantize))):
        output, _ = run(recipe, task.model, Context(data=task.data))
        with torch.no_grad():
            gaps.append(float((output(inputs) - task.model(inputs)).square().mean()))
    assert gaps[1] < 0.8 * gaps[0]
