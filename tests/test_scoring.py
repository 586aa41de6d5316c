"""Scores by hand."""

import math

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError
from featherweight.scoring import Score, evaluate, evaluate_outputs, loss_function, lower, score_function


def score(loader, **settings):
    return evaluate_outputs(lambda inputs: inputs, Data(example=None, test=loader, **settings), "test")


def test_accuracy_by_hand():
    loader = [
        (torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 0, 0])),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([1])),
    ]
    result = score(loader)
    assert result.samples.tolist() == [1, 0, 1, 1]
    assert result.value == 0.75
    assert result.higher_is_better
    assert result.name == "accuracy"
    assert result.error == pytest.approx(0.5 / 2)  # standard deviation of 1, 0, 1, 1 is a half


def test_accuracy_of_every_step_of_a_sequence():
    output = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # [batch, classes, steps]
    assert score([(output, torch.tensor([[0, 0]]))]).value == 0.5


def test_named_errors_are_lower():
    loader = [(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]]))]
    squared, absolute = score(loader, score="mse"), score(loader, score="mae")
    assert squared.samples.tolist() == [5.0, 2.0]
    assert absolute.samples.tolist() == [2.0, 1.0]
    assert not squared.higher_is_better
    assert loss_function(Data(example=None, loss="mse"))(*loader[0]).item() == 3.5
    assert loss_function(Data(example=None, loss="l1"))(*loader[0]).item() == 1.5


def test_labels_of_yes_or_no_by_hand():
    loader = [(torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[1, 1], [0, 1]]))]
    assert score(loader, score="binary_accuracy").samples.tolist() == [0.5, 1.0]
    loss = loss_function(Data(example=None, loss="binary_cross_entropy"))
    chances = torch.sigmoid(torch.tensor([2.0, -1.0, 0.0, 3.0]))
    wanted = -(chances[[0, 1, 3]].log().sum() + (1 - chances[2]).log()) / 4
    assert loss(*loader[0]).item() == pytest.approx(wanted.item())
    assert loss(torch.zeros(3, 1), torch.tensor([0, 1, 1])).item() == pytest.approx(math.log(2))
    with pytest.raises(DataError, match=r"label -1 is out of range.*0 for no to 1 for yes"):
        loss(torch.zeros(2), torch.tensor([-1.0, 1.0]))


def test_a_mean_a_batch_is_weighted_by_its_size():
    loader = [(torch.full((3, 1), 1.0), torch.zeros(3)), (torch.full((1, 1), 5.0), torch.zeros(1))]
    result = score(loader, score=lambda output, target: output.mean())
    assert result.value == 2.0
    assert result.samples.tolist() == [1.0, 5.0]


def test_lower_and_drop():
    function = lower(lambda output, target: output.flatten())
    result = score([(torch.tensor([[1.0], [3.0]]), torch.zeros(2))], score=function)
    assert not result.higher_is_better
    worse = Score(5.0, False, torch.tensor([4.0, 6.0]), "x")
    assert result.drop(worse) == 3.0
    up, down = Score(0.9, True, torch.ones(2), "x"), Score(0.7, True, torch.ones(2), "x")
    assert up.drop(down) == pytest.approx(0.2)
    assert down.drop(up) == pytest.approx(-0.2)


def test_errors_are_paired_where_they_can_be():
    before, after = (
        Score(0.5, True, torch.tensor([1.0, 0.0, 1.0, 0.0]), "x"),
        Score(0.25, True, torch.tensor([1.0, 0.0, 0.0, 0.0]), "x"),
    )
    assert before.drop_error(after) == pytest.approx(
        math.sqrt((0.75 + 1) / 3 / 4)
    )  # one change is added, half each way
    assert before.drop_error(before) == pytest.approx(math.sqrt(1 / 3 / 4))
    halves = Score(0.5, True, torch.tensor([0.5, 0.5, 1.0, 0.0]), "x")
    assert before.drop_error(halves) == pytest.approx(math.sqrt(0.5 / 3 / 4))
    other = Score(0.5, True, torch.tensor([1.0, 0.0]), "x")
    assert before.drop_error(other) == pytest.approx(math.hypot(before.error, other.error))
    assert Score(1.0, True, torch.ones(1), "x").error == math.inf


def test_evaluation_puts_the_modes_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2)).train()
    model[1].eval()
    data = Data(example=None, test=[(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))])
    assert evaluate(model, data, "test").value == evaluate(model, data, "test").value
    assert model.training
    assert not model[1].training


def test_output_is_chosen_for_loss_and_score():
    part = (torch.tensor([[0.0, 1.0]]), torch.zeros(1))
    data = Data(
        example=None, output=0, loss=lambda output, target: output.sum(), score=lambda output, target: output[:, 1]
    )
    assert loss_function(data)(part, None).item() == 1.0
    assert score_function(data)[0](part, None).item() == 1.0
    whole = Data(example=None, loss=lambda output, target: output[0].sum())
    assert loss_function(whole)(part, None).item() == 1.0


def test_what_is_refused():
    one = [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))]
    for loader, settings, words in (
        (one, {"score": "acuracy"}, "acuracy.*accuracy"),
        ([torch.ones(1, 2)], {}, "no target"),
        (one, {"score": lambda output, target: output.sum() * math.nan}, "nan on batch 0"),
        ([], {}, "empty"),
    ):
        with pytest.raises(DataError, match=words):
            score(loader, **settings)
    with pytest.raises(DataError, match=r"mes.*mse"):
        loss_function(Data(example=None, loss="mes"))
