"""Weights that training moves away from zero stay."""

import pytest
import torch
from killed import resumes_to_the_same_weights
from torch import nn

from featherweight.data import Data
from featherweight.running import run
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneMovement
from featherweight.zoo import small_models


def prune(technique, task, **fields):
    context = Context(data=task.data, teacher=task.model, seed=1, **fields)
    output, edits = run(technique, task.model, context)
    return output, edits, context


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_ends_at_the_ratio(ranking):
    output, edits, context = prune(PruneMovement(0.8, ranking, epochs=8), small_models()["recurrent"])
    weights = {name: value for name, value in output.named_parameters() if value.dim() >= 2}
    assert set(edits[0].sparse) == context.sparse == set(weights)
    if ranking == "layer":
        for value in weights.values():
            assert int((value != 0).sum()) == round(value.numel() * 0.2)
    total = sum(value.numel() for value in weights.values())
    assert sum(int((value != 0).sum()) for value in weights.values()) == pytest.approx(0.2 * total, abs=4)


def test_a_small_weight_that_grows_outlives_a_large_one_that_shrinks():
    """The targets want 0.3 and 0.1 where the weights are 0.1 and 1."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 1.0]]))
    inputs = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    batches = [(inputs, inputs @ torch.tensor([[0.3], [0.1]]))] * 20
    data = Data(example=inputs[:1], train=batches, validate=batches[:1], loss="mse", score="mse")
    output, _ = run(PruneMovement(0.5, epochs=2, learning_rate=0.01), model, Context(data=data))
    assert output.weight[0, 0] != 0
    assert output.weight[0, 1] == 0


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path):
    """The loader fails in the fifth epoch; scores and values set aside come back from the checkpoint."""
    technique = PruneMovement(0.7, epochs=8, learning_rate=0.01)
    resumes_to_the_same_weights(technique, small_models()["perceptron"], tmp_path, at=6)


def test_zeros_of_earlier_steps_and_its_own_outlive_training():
    task = small_models()["plain"]
    task.model.classifier.weight.data[:, ::2] = 0
    pruned, _, context = prune(PruneMovement(0.6, epochs=3), task, sparse={"classifier.weight"})
    assert not pruned.classifier.weight[:, ::2].any()
    healed, _, _ = prune(Recipe((PruneMovement(0.6, epochs=3), Distill(epochs=2))), task, sparse={"classifier.weight"})
    for name in context.sparse:
        assert int((healed.get_parameter(name) == 0).sum()) >= int(0.59 * healed.get_parameter(name).numel()), name


def test_no_weight_decides_nothing():
    data = Data(example=torch.ones(1, 2), train=[torch.ones(1, 2)], validate=[torch.ones(1, 2)])
    _, edits = run(PruneMovement(), nn.Sequential(nn.ReLU()), Context(data=data))
    assert not edits
