"""Noise on every weight: what it diverges from its prior by hand, which weights bear it, and that a run resumes to the same weights."""

import math

import pytest
import torch
from killed import resumes_to_the_same_weights
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneVariational
from featherweight.techniques.prune_variational import divergence, log_alpha
from featherweight.zoo import small_models


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prune(technique, task, **fields):
    context = Context(data=task.data, teacher=task.model, seed=1, **fields)
    output, edits = run(technique, task.model, context)
    return output, edits, context


@pytest.fixture(scope="module")
def idle():
    """A linear model of ten inputs, two of which matter, healed; and its data, which are noisy."""
    inputs = drawn(512, 10, seed=0)
    targets = inputs[:, :1] - 0.5 * inputs[:, 1:2] + 0.3 * drawn(512, 1, seed=1)
    batches = [(inputs[at : at + 32], targets[at : at + 32]) for at in range(0, 512, 32)]
    data = Data(example=inputs[:1], train=batches, validate=batches[:4], loss="mse", score="mse")
    torch.manual_seed(0)
    model, _ = run(Distill(epochs=5, learning_rate=1e-2, teacher_share=0.0), nn.Linear(10, 1), Context(data))
    return model, data


def kept(idle, **settings):
    model, data = idle
    technique = PruneVariational(epochs=40, learning_rate=1e-2, teacher_share=0.0, **settings)
    weight = run(technique, model, Context(data)).model.weight[0]
    return weight, {place for place, value in enumerate(weight.tolist()) if value != 0}


def test_divergence_follows_the_expectation_that_it_approximates():
    """E log |1 + sqrt(alpha) e| over a normal e, by adding up: the divergence is 0.5 log alpha's negative plus it, and a constant."""
    steps = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    density = (-0.5 * steps.square()).exp() / math.sqrt(2 * math.pi) * float(steps[1] - steps[0])

    def exact(alpha):
        return -0.5 * alpha + float(((1 + math.exp(0.5 * alpha) * steps).abs().clamp_min(1e-9).log() * density).sum())

    least = exact(20.0)
    for alpha in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0):
        found = float(divergence(torch.tensor(alpha, dtype=torch.float64)))
        assert found == pytest.approx(exact(alpha) - least, abs=0.02), alpha
    assert float(divergence(torch.tensor(20.0))) == pytest.approx(0, abs=1e-6)


def test_alpha_is_the_variance_over_the_square_and_ends():
    found = log_alpha(torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.5, -3.0, 1.0]))
    assert found.tolist() == pytest.approx([0.5 - math.log(4), -3.0, 8.0])


def test_inputs_that_do_not_matter_go(idle):
    weight, left = kept(idle, rate=10.0)
    assert left == {0, 1}
    assert weight[:2].tolist() == pytest.approx([1.0, -0.5], abs=0.06)


def test_rate_and_threshold_say_how_many_go(idle):
    assert len(kept(idle, rate=0.0)[1]) >= 9
    assert 2 <= len(kept(idle, rate=1.0)[1]) < 6
    assert not kept(idle, rate=1.0, threshold=-10.0)[1], "any noise is too much"


@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_every_kind_of_layer_gets_zeros(name):
    task = small_models()[name]
    output, edits, context = prune(PruneVariational(rate=30.0, threshold=-2.0, epochs=4), task)
    weights = {key: value for key, value in output.named_parameters() if value.dim() >= 2}
    assert set(edits[0].sparse) == context.sparse == set(weights)
    assert all((value == 0).any() for value in weights.values())
    assert any(value.any() for value in weights.values())


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path):
    """The loader fails in the fifth epoch; variances come back from the checkpoint."""
    technique = PruneVariational(rate=10.0, threshold=0.0, epochs=8, learning_rate=0.01)
    resumes_to_the_same_weights(technique, small_models()["perceptron"], tmp_path, at=7)


def test_zeros_of_earlier_steps_and_its_own_outlive_training():
    task = small_models()["plain"]
    task.model.classifier.weight.data[:, ::2] = 0
    technique = PruneVariational(rate=30.0, threshold=-2.0, epochs=3)
    pruned, _, _ = prune(technique, task, sparse={"classifier.weight"})
    assert not pruned.classifier.weight[:, ::2].any()
    healed, _, context = prune(Recipe((technique, Distill(epochs=2))), task, sparse={"classifier.weight"})
    for name in context.sparse:
        assert not healed.get_parameter(name)[pruned.get_parameter(name) == 0].any(), name


def test_frozen_weights_get_no_noise_and_no_zeros():
    task = small_models()["perceptron"]
    first, *_ = (name for name, value in task.model.named_parameters() if value.dim() == 2)
    task.model.get_parameter(first).requires_grad_(False)
    output, edits, _ = prune(PruneVariational(rate=30.0, threshold=-10.0, epochs=2), task)
    assert torch.equal(output.get_parameter(first), task.model.get_parameter(first))
    assert first not in edits[0].sparse
    assert edits[0].sparse


def test_no_weight_decides_nothing():
    data = Data(example=torch.ones(1, 2), train=[torch.ones(1, 2)], validate=[torch.ones(1, 2)])
    _, edits = run(PruneVariational(), nn.Sequential(nn.ReLU()), Context(data=data))
    assert not edits
