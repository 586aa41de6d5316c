"""Training that makes the least important units small before they are cut."""

import dataclasses

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.graph import coupled_groups
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import PruneChannels, RegularizeGroups
from featherweight.techniques.importance import indices, sums
from featherweight.techniques.regularize_groups import _Penalty
from featherweight.zoo import small_models

STRONG = RegularizeGroups(epochs=6, learning_rate=0.01, strength=0.05)


def groups_of(model, example):
    return coupled_groups(model, (example,))[0]


def slow_gradient(model, groups, strength):
    """The penalty of the docstring, unit by unit, differentiated by autograd."""
    tensors = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        squares = []
        for unit in group.units:
            parts = [
                tensors[n].transpose(0, d)[list(i)]
                for (n, d), i in zip(group.members, unit, strict=True)
                if n in tensors
            ]
            squares.append(sum(part.double().square().sum() for part in parts))
        squares = torch.stack(squares)
        norms = squares.detach().sqrt()
        gamma = 2 ** (4 * (norms.max() - norms) / (norms.max() - norms.min()))
        total = total + strength / 2 * (gamma * squares).sum()
    total.backward()


def test_the_gradient_is_that_of_the_penalty():
    for name in ("plain", "residual", "recurrent"):
        task = small_models()[name]
        groups = groups_of(task.model, task.data.example)
        slow_gradient(task.model, groups, strength=0.3)
        wanted = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
        assert wanted
        parameters = dict(task.model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        penalty = _Penalty(task.model, groups, 0.3, epochs=1)
        penalty.follow(0.0, 1.0)
        penalty.add(parameters)
        for key, gradient in wanted.items():
            assert torch.allclose(parameters[key].grad, gradient, rtol=1e-4, atol=1e-6), key


def test_the_penalty_grows_and_weighs_the_units_anew_at_each_epoch():
    task = small_models()["perceptron"]
    parameters = dict(task.model.named_parameters())
    penalty = _Penalty(task.model, groups_of(task.model, task.data.example), 1.0, epochs=4)

    def gradient(done):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        assert penalty.follow(0.0, done) is False
        penalty.add(parameters)
        return parameters["0.weight"].grad.clone()

    first = gradient(0.1)
    assert float(gradient(0.0).abs().max()) == 0
    assert torch.allclose(gradient(0.2), 2 * first)
    with torch.no_grad():
        parameters["0.weight"][0] *= 100
    assert torch.allclose(gradient(0.2)[1:], 2 * first[1:])  # the same epoch: the same factors
    assert not torch.allclose(gradient(0.3)[1:], 3 * first[1:])


def spread(model, example):
    """The norm of the least important half of the units over that of the other half, averaged over the groups."""
    shares = []
    tensors = dict(model.named_parameters())
    for group in groups_of(model, example):
        norms = torch.zeros(len(group), dtype=torch.float64)
        for (name, dim), owned in zip(group.members, indices(group), strict=True):
            if name in tensors:
                norms += sums(tensors[name].square(), dim)[owned].sum(1)
        ordered = norms.sqrt().sort().values
        half = len(ordered) // 2
        shares.append(float(ordered[:half].sum() / ordered[half:].sum()))
    return sum(shares) / len(shares)


def train(task, technique):
    context = Context(data=task.data, teacher=task.model)
    return run(technique, task.model, context).model


def test_the_least_important_half_shrinks(clusters):
    example = clusters.data.example[0]
    free, pulled = (train(clusters, dataclasses.replace(STRONG, strength=strength)) for strength in (0.0, 0.05))
    assert spread(pulled, example) < 0.7 * spread(free, example)


def test_a_cut_after_it_changes_less(clusters):
    """What counts: the mean distance between the model and its cut, relative to what it gives."""
    inputs = torch.cat([batch for batch, _ in clusters.data.validate])

    def change(strength):
        model = train(clusters, dataclasses.replace(STRONG, strength=strength))
        cut = run(PruneChannels(ratio=0.5), model, Context(data=clusters.data)).model
        with torch.no_grad():
            return float((model(inputs) - cut(inputs)).norm() / model(inputs).norm())

    assert change(0.05) < 0.8 * change(0.0)


def test_the_last_epoch_is_kept_though_the_start_scores_better(clusters):
    before = clusters.model.state_dict()
    output = train(clusters, RegularizeGroups(epochs=1, strength=10.0, learning_rate=0.05))
    assert any(not torch.equal(value, before[name]) for name, value in output.state_dict().items())


def test_a_killed_training_ends_with_the_same_weights(clusters, tmp_path):
    """The penalty is taken anew from the weights, so a checkpoint need not hold it."""

    def train_in(folder, stop=""):
        def report(message, done):
            if stop and stop in message:
                raise KeyboardInterrupt

        context = Context(data=clusters.data, teacher=clusters.model, workspace=tmp_path / folder, report=report)
        return run(dataclasses.replace(STRONG, epochs=4), clusters.model, context).model.state_dict()

    whole = train_in("whole")
    with pytest.raises(KeyboardInterrupt):
        train_in("killed", stop="epoch 3/4")
    resumed = train_in("killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_recipe_of_it_and_a_cut_and_its_scope(clusters):
    example = clusters.data.example[0]
    context = Context(data=clusters.data, teacher=clusters.model)
    recipe = Recipe((RegularizeGroups(epochs=1), PruneChannels(ratio=0.5)))
    output = run(recipe, clusters.model, context).model
    assert output.inner[0].out_features == 16
    assert output(example).shape == (1, 4)
    _, edits = run(only("head", RegularizeGroups(epochs=1)), clusters.model, context)
    assert not edits
    assert "no coupled group" in context.untouched[-1].reason


def test_what_cannot_be_traced_is_said():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return x @ self.weight if x.sum().item() > 0 else x

    batches = [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))]
    context = Context(data=Data(example=torch.ones(1, 2), train=batches, validate=batches))
    _, edits = run(RegularizeGroups(epochs=1), Untraceable(), context)
    assert not edits
    assert context.untouched
