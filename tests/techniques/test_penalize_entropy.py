"""Entropy-penalized training: what bits are, where the penalty pushes, and that a run resumes to the same codes."""

import math

import pytest
import torch
from torch import nn

from featherweight.coding import encode_tensor
from featherweight.data import Data
from featherweight.layers import QuantizedLinear
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import PenalizeEntropy, QuantizeWeights
from featherweight.techniques.penalize_entropy import bits


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3)).eval()


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 12, generator=generator)
    labels = (inputs[:, :3] + 0.1 * torch.randn(256, 3, generator=generator)).argmax(1)
    batches = [(inputs[at : at + 32], labels[at : at + 32]) for at in range(0, 256, 32)]
    return Data(example=inputs[:1], train=batches, calibrate=batches, validate=batches)


def codes(model):
    return {path: layer.codes for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def size(model):
    return sum(len(encode_tensor(value)) for value in codes(model).values())


@pytest.mark.parametrize("prior", [(-1.0, 0.7, 0.0), (0.0, 2.0, 3.0), (-3.0, 1.0, -2.0)])
def test_the_chances_of_all_whole_numbers_sum_to_one(prior):
    places = torch.arange(-400, 401, dtype=torch.float64)
    chances = 2.0 ** -bits(places, torch.tensor(prior, dtype=torch.float64))
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-9)


def test_bits_by_hand():
    """Both distributions alike: the logistic one of scale 1 has 2 sigmoid(1/2) - 1 between -1/2 and 1/2."""
    middle = 2 / (1 + math.exp(-0.5)) - 1
    assert float(bits(torch.zeros(1), torch.zeros(3))) == pytest.approx(-math.log2(middle), rel=1e-6)
    right = 1 / (1 + math.exp(-2.5)) - 1 / (1 + math.exp(-1.5))
    both = bits(torch.tensor([2.0, -2.0]), torch.zeros(3))
    assert both.tolist() == pytest.approx([-math.log2(right)] * 2, rel=1e-5)


def test_bits_and_their_gradients_stay_finite_far_out():
    places = torch.tensor([-3000.0, 200.0, 0.0], requires_grad=True)
    prior = torch.tensor([-3.0, -1.0, 8.0], requires_grad=True)
    found = bits(places, prior).sum()
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(places.grad).all()
    assert torch.isfinite(prior.grad).all()
    assert places.grad[0] < 0 < places.grad[1], "a smaller magnitude is cheaper"


def test_a_higher_rate_gives_fewer_bytes_and_nothing_is_learnt_for_free():
    sizes = []
    for rate in (0.0, 0.5, 50.0):
        made, _ = run(PenalizeEntropy(epochs=12, rate=rate, learning_rate=5e-3), perceptron(), Context(data=data()))
        sizes.append(size(made))
    assert sizes[0] > 1.15 * sizes[1] > 1.3 * sizes[2], sizes


def test_quantized_layers_are_trained_as_they_are():
    recipe = Recipe((QuantizeWeights(bits=3), PenalizeEntropy(epochs=2, rate=0.1)))
    made, edits = run(recipe, perceptron(), Context(data=data()))
    assert [type(edit).__name__ for edit in edits] == ["Swap", "Swap", "Write"]
    assert made[0].bits == 3
    assert made[0].codes.dtype == torch.int8
    assert int(made[0].codes.abs().max()) <= 3
    assert made[0].scale.shape == (40,)


def test_zeros_of_pruned_tensors_stay():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    context = Context(data=data(), sparse={"0.weight"})
    made, _ = run(PenalizeEntropy(epochs=3, rate=0.0, learning_rate=1e-2), model, context)
    assert not made[0].codes[:, ::2].any()
    assert made[0].codes[:, 1::2].any()


def test_a_killed_run_ends_with_the_same_codes(tmp_path):
    technique = PenalizeEntropy(epochs=4, rate=0.2, learning_rate=5e-3)
    whole, _ = run(technique, perceptron(), Context(data=data(), workspace=tmp_path / "whole"))

    def stop(message, done):
        if "epoch 3/" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(technique, perceptron(), Context(data=data(), workspace=tmp_path / "cut", report=stop))
    resumed, _ = run(technique, perceptron(), Context(data=data(), workspace=tmp_path / "cut"))
    for path, value in codes(whole).items():
        assert torch.equal(codes(resumed)[path], value)
    assert torch.equal(resumed[0].scale, whole[0].scale)


def test_nothing_to_quantize_is_said():
    context = Context(data=Data(example=torch.randn(2, 3), train=data().train, validate=data().validate))
    run(PenalizeEntropy(epochs=1), nn.Sequential(nn.ReLU()), context)
    assert context.untouched[0].reason == "no quantized layer is in scope"
