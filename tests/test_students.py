"""Students cut out of a model inherit its weights; assistants teach in turn."""

import dataclasses

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import named_tensors
from featherweight.errors import RecipeError
from featherweight.students import student_of, teach
from featherweight.technique import Context
from featherweight.techniques import Distill
from featherweight.zoo import Plain, randomise, small_models

MODELS = small_models()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual() for _ in range(4)))
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.blocks(self.first(x)).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


@pytest.fixture
def deep():
    torch.manual_seed(0)
    return Deep().eval()


DATA = MODELS["plain"].data


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_fewer_channels_are_some_of_the_old_ones(deep):
    student = student_of(deep, DATA, width=0.5)
    assert student.first.weight.shape == (8, 3, 3, 3)
    rows = {tuple(row.flatten().tolist()) for row in deep.first.weight}
    assert all(tuple(row.flatten().tolist()) in rows for row in student.first.weight)
    assert student.last.weight.shape == (4, 8)
    assert size(deep) > 3 * size(student)


def test_fewer_blocks_are_some_of_the_old_ones(deep):
    student = student_of(deep, DATA, width=1.0, depth=0.5)
    kept = [index for index, block in enumerate(student.blocks) if isinstance(block, Residual)]
    assert len(kept) == 2
    for index in kept:
        assert torch.equal(student.blocks[index].conv1.weight, deep.blocks[index].conv1.weight)


def test_cheaper_operators(deep):
    student = student_of(deep, DATA, width=1.0, operators="depthwise_separable")
    assert isinstance(student.first, nn.Conv2d), "the first layer has three channels and stays dense"
    for block in student.blocks:
        assert [layer.groups for layer in block.conv1] == [16, 1]


def test_all_of_it_at_once(deep):
    before = {name: value.clone() for name, value in named_tensors(deep).items()}
    made = [student_of(deep, DATA, 0.5, 0.5, "depthwise_separable", seed=1) for _ in range(2)]
    assert size(deep) > 10 * size(made[0])
    assert made[0](DATA.example).shape == deep(DATA.example).shape
    first, second = (model.state_dict() for model in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in named_tensors(deep).items())


def test_nothing_to_make_less_is_a_copy(deep):
    student = student_of(deep, DATA, width=1.0)
    assert student is not deep
    assert torch.equal(student(DATA.example), deep(DATA.example))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0.0}, "above 0"),
        ({"depth": 1.5}, "at most 1"),
        ({"operators": "shift"}, "depthwise_separable"),
        ({"depth": 0.5}, "found nothing to do"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        student_of(MODELS["plain"].model, DATA, **settings)


def test_students_are_taught_in_turn():
    """The last follows the one before it, not the first teacher: with one class apart it can only be told by whom."""
    torch.manual_seed(0)
    teacher, assistant, student = (nn.Linear(3, 2) for _ in range(3))
    inputs = torch.randn(64, 3)
    data = Data(example=inputs, train=[inputs] * 20, validate=[(inputs, teacher(inputs).argmax(1))])
    frozen = assistant.requires_grad_(False)
    step = Distill(epochs=20, learning_rate=0.05)
    agreeing = dataclasses.replace(data, validate=[(inputs, frozen(inputs).argmax(1))])
    taught = teach([frozen, student], teacher, step, Context(data=agreeing))
    assert not taught.training
    follows = [
        (taught(inputs).argmax(1) == other(inputs).argmax(1)).float().mean().item() for other in (frozen, teacher)
    ]
    assert follows[0] > 0.95 > follows[1]


def test_a_network_that_is_born_again_is_a_new_one():
    teacher = randomise(Plain(), 0).eval()
    fresh = [randomise(Plain(), seed) for seed in (1, 2)]
    before = {name: value.clone() for name, value in named_tensors(fresh[1]).items()}
    again = teach(fresh, teacher, Distill(epochs=1), Context(data=DATA))
    assert again is not fresh[1]
    assert all(torch.equal(value, before[name]) for name, value in named_tensors(fresh[1]).items())
