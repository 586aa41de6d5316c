"""Several models as one teacher, and students that teach each other."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data
from featherweight.ensembles import ensemble, mutual
from featherweight.errors import ModelError
from featherweight.running import run
from featherweight.scoring import evaluate, lower
from featherweight.technique import Context
from featherweight.techniques import Distill


class Constant(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return {"logits": self.values.expand(len(x), -1)}


def test_probabilities_are_averaged():
    members = [Constant([9.0, 9.0]), Constant([torch.tensor(3.0).log().item(), 0.0])]  # 1/2, 1/2 and 3/4, 1/4
    logits = ensemble(members)(torch.zeros(3, 1))["logits"]
    torch.testing.assert_close(F.softmax(logits, 1), torch.tensor([[0.625, 0.375]] * 3))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(3))


def test_outputs_are_averaged():
    members = [Constant([1.0, 4.0]), Constant([3.0, 0.0])]
    averaged = ensemble(members, classes=False)(torch.zeros(1, 1))["logits"]
    torch.testing.assert_close(averaged, torch.tensor([[2.0, 2.0]]))


def test_an_ensemble_of_none_is_refused():
    with pytest.raises(ModelError, match="at least one"):
        ensemble([])


def perceptron(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


@pytest.fixture
def data():
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).split(20)
    batches = [(part, part[:, :3].argmax(1)) for part in inputs]
    return Data(example=inputs[0], train=batches, validate=batches, score=lower(F.cross_entropy))


def test_it_teaches(data):
    teacher, student = ensemble([perceptron(1), perceptron(2)]), perceptron(3)
    unlabelled = dataclasses.replace(data, train=[inputs for inputs, _ in data.train])
    agreement = dataclasses.replace(data, validate=[(x, teacher(x).detach().softmax(1)) for x, _ in data.validate])
    context = Context(data=dataclasses.replace(agreement, train=unlabelled.train), teacher=teacher)
    taught, _ = run(Distill(epochs=10, learning_rate=0.01), student, context)
    assert evaluate(taught, agreement, "validate").value < evaluate(student, agreement, "validate").value


@pytest.mark.parametrize("labels", [True, False])
def test_members_learn_from_each_other(data, labels):
    students = ensemble([perceptron(1), perceptron(2)])
    train = data.train if labels else [inputs for inputs, _ in data.train]
    together, _ = run(
        Distill(epochs=10, learning_rate=0.02),
        students,
        Context(data=dataclasses.replace(data, train=train, step=mutual(data))),
    )

    def apart(model):
        first, second = (F.softmax(member(data.train[0][0]), 1) for member in model.members)
        return (first - second).abs().mean().item()

    if labels:
        for before, after in zip(students.members, together.members, strict=True):
            assert evaluate(after, data, "validate").value < evaluate(before, data, "validate").value
    assert apart(together) < apart(students)


def test_the_mutual_loss_by_hand(data):
    members = ensemble([nn.Linear(1, 2), nn.Linear(1, 2)])
    for member, bias in zip(members.members, (0.0, torch.tensor(3.0).log().item()), strict=True):
        nn.init.zeros_(member.weight)
        member.bias.data = torch.tensor([bias, 0.0])
    even, skewed = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    between = (skewed * (skewed / even).log()).sum() + (even * (even / skewed).log()).sum()
    labels = -(even[0].log() + skewed[0].log())
    batch = (torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(mutual(data, 0.25)(members, batch), 0.25 * between + 0.75 * labels)
    torch.testing.assert_close(mutual(data, 0.25)(members, batch[0]), between)


@pytest.mark.parametrize("model", [nn.Linear(1, 2), ensemble([nn.Linear(1, 2)])], ids=["no ensemble", "one member"])
def test_mutual_learning_wants_two(data, model):
    with pytest.raises(ModelError, match="two models or more"):
        mutual(data)(model, torch.ones(1, 1))
