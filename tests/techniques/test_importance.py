"""How much a unit matters, by every kind, on numbers worked out by hand."""

import copy

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import named_tensors
from featherweight.errors import DataError
from featherweight.graph import coupled_groups
from featherweight.technique import Context
from featherweight.techniques.importance import FROM_DATA, KINDS, importance, indices
from featherweight.zoo import small_models


def scores(model, example, kind, calibrate=None, count=8, **data):
    groups, _ = coupled_groups(model, (example,))
    context = Context(data=Data(example=example, calibrate=calibrate, **data), seed=3)
    return groups, importance(model, groups, kind, context, count)


def linear_pair():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    model[1].weight.data = torch.tensor([[1.0, 2.0, 3.0]])
    return model


def test_magnitude_is_summed_over_members_relative_to_each_mean():
    _, [l1] = scores(linear_pair(), torch.ones(2, 2), "l1")
    wanted = torch.tensor([7, 1, 2]) / (10 / 3) + torch.tensor([1, 2, 3]) / 2
    assert torch.allclose(l1, (wanted / wanted.mean()).double())
    _, [l2] = scores(linear_pair(), torch.ones(2, 2), "l2")
    wanted = (torch.tensor([25, 1, 4]) / 10 + torch.tensor([1, 4, 9]) / (14 / 3)).sqrt()
    assert torch.allclose(l2, (wanted / wanted.mean()).double())


def test_taylor_and_fisher_against_gradients_by_hand():
    """y = sum_u c_u (a_u . x), squared error: dL/da_u = 2 (y - t) c_u x and dL/dc_u = 2 (y - t) (a_u . x)."""
    model = linear_pair()
    batches = [(torch.tensor([[1.0, 0.5]]), torch.tensor([[7.0]])), (torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0]]))]
    taylor, fisher = torch.zeros(3), torch.zeros(3)
    for x, t in batches:
        a, c = model[0].weight.data, model[1].weight.data[0]
        error = 2 * (model(x) - t).item()
        rows, column = a * error * c[:, None] * x, c * error * (a @ x[0])
        taylor += (rows.sum(1) + column) ** 2 / 2
        fisher += (rows.square().sum(1) + column**2) / 2
    _, [found] = scores(model, torch.ones(2, 2), "taylor", batches, loss="mse")
    assert torch.allclose(found, taylor.double())
    _, [found] = scores(model, torch.ones(2, 2), "fisher", batches, loss="mse")
    assert torch.allclose(found, fisher.double())


def test_a_unit_near_the_others_is_the_least_by_geometric_median():
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.0], [2.0], [3.0]])
    model[1].weight.data = torch.ones(1, 3)
    _, [found] = scores(model, torch.ones(2, 1), "geometric_median")
    wanted = torch.tensor([5.0, 3.0, 4.0])
    assert torch.allclose(found, (wanted / wanted.mean()).double())


def test_batch_norm_scale_and_what_stands_in_where_there_is_none():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)]
    model = nn.Sequential(*layers).eval()
    model[1].weight.data = torch.tensor([-2.0, 0.5, 0.5])
    example = torch.ones(2, 1, 2, 2)
    groups, found = scores(model, example, "batch_norm")
    assert [group.name for group in groups] == ["0", "2"]
    assert torch.allclose(found[0], torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64))
    assert torch.equal(found[1], scores(model, example, "l2")[1][1])


def test_activation_is_the_mean_norm_of_the_output_channel():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1))
    model[0].weight.data = torch.tensor([1.0, -3.0]).reshape(2, 1, 1, 1)
    images = [torch.full((2, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 4.0)]
    _, [found] = scores(model, images[0], "activation", images)
    assert torch.allclose(found, torch.tensor([0.5, 1.5], dtype=torch.float64))
    _, [first] = scores(model, images[0], "activation", images, count=1)
    assert torch.allclose(first, found)  # relative, so the level of the images does not matter


@pytest.mark.parametrize("name", ["plain", "residual", "branches", "recurrent", "transformer", "twice"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_scores_every_unit_and_leaves_the_model_as_it_was(kind, name):
    task = small_models()[name]
    model = task.model
    next(model.parameters()).requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    model.train()
    before = copy.deepcopy(model.state_dict())
    groups, found = scores(model, task.data.example, kind, task.data.calibrate)
    assert groups
    for group, score in zip(groups, found, strict=True):
        assert score.shape == (len(group),)
        assert bool((score >= 0).all())
        assert float(score.std()) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert [p.grad is not None for p in model.parameters()] == [True] + [False] * (len(list(model.parameters())) - 1)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_without_labels_targets_are_drawn_from_the_predictions(kind, loss):
    task = small_models()["plain"]
    inputs = [batch for batch, _ in task.data.calibrate]
    _, found = scores(task.model, task.data.example, kind, inputs, loss=loss)
    _, again = scores(task.model, task.data.example, kind, inputs, loss=loss)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)
        assert float(first.min()) >= 0
        assert float(first.max()) > 0  # the model's own outputs as they are would give no gradient


@pytest.mark.parametrize("kind", sorted(FROM_DATA))
def test_missing_calibration_data_is_named(kind):
    with pytest.raises(DataError, match="calibrate"):
        scores(linear_pair(), torch.ones(2, 2), kind)


def test_indices_are_those_of_the_units():
    task = small_models()["plain"]
    groups, _ = coupled_groups(task.model, (task.data.example,))
    group = next(group for group in groups if ("hidden.weight", 1) in group.members)
    owned = indices(group)[group.members.index(("hidden.weight", 1))]
    assert owned.tolist()[1] == [4, 5, 6, 7]  # two by two positions of the second channel
    assert len(named_tensors(task.model)["hidden.weight"][0]) == owned.numel()
