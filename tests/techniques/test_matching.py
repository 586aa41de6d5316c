"""Matching points: read as text, captured by hooks that go again, fitted by projections that are dropped."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import DataError, ModelError, RecipeError
from featherweight.layers import MultiHeadAttention
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import Distill
from featherweight.techniques.imitation import self_relation
from featherweight.techniques.matching import FEATURE_LOSSES, Matching, Term, captured, terms


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def convolutions(*channels, stride=1):
    pairs = zip((3, *channels), channels, strict=False)
    layers = [nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).eval()


def made(model):
    torch.manual_seed(0)
    with torch.no_grad():
        model(images(2))
    return model


def images(count):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_sum_is_read():
    assert terms("soft_targets") == (Term("soft_targets"),)
    read = terms("2 * dkd + 0.5*hint a.0->b.1 + attention layer2 + 1e-2 * relational x -> y")
    assert read == (
        Term("dkd", 2.0),
        Term("hint", 0.5, "a.0", "b.1"),
        Term("attention", FEATURE_LOSSES["attention"][1], "layer2", "layer2"),
        Term("relational", 0.01, "x", "y"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dkb", "dkd"),
        ("", "cannot be read"),
        ("soft_targets hint a", "cannot be read"),
        ("1.2.3 * dkd", "no number"),
        ("hint", "wants the path"),
        ("dist layer1", "no path"),
        ("dkd + ", "cannot be read"),
    ],
)
def test_a_sum_that_cannot_be_read_is_refused(text, words):
    with pytest.raises(RecipeError, match=words):
        Distill(loss=text)


def test_hooks_go_also_on_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with captured(model, ["0"]) as seen:
        output = model(torch.ones(1, 3))
    assert torch.equal(torch.relu(seen["0"]), output)
    assert hooks(model) == 0
    with pytest.raises(ModelError, match="nowhere"), captured(model, ["0", "nowhere"]):
        pass
    with pytest.raises(RuntimeError), captured(model, ["0"]):
        model(torch.ones(1, 5))
    assert hooks(model) == 0


def test_a_recurrent_layer_gives_its_outputs():
    model = nn.LSTM(3, 5, batch_first=True)
    with captured(nn.Sequential(model), ["0"]) as seen:
        output, _ = model(torch.ones(2, 4, 3))
    assert seen["0"] is output


def distance(text, student, teacher, inputs):
    matching = Matching(terms(text), student, teacher, inputs)
    with captured(student, matching.student_paths) as seen, captured(teacher, matching.teacher_paths) as wanted:
        student(inputs)
        teacher(inputs)
    return matching, matching(seen, wanted)


def test_sizes_are_fitted_by_projections_and_pooling():
    student, teacher = made(convolutions(4, stride=2)), made(convolutions(6))
    matching, loss = distance("hint 0", student, teacher, images(2))
    assert matching.projections[0].weight.shape == (6, 4)
    loss.backward()
    assert matching.projections[0].weight.grad.abs().sum() > 0
    assert student[0][0].weight.grad.abs().sum() > 0
    assert teacher[0][0].weight.grad is None
    for loss in ("attention", "relational"):
        assert not list(distance(f"{loss} 0", student, teacher, images(2))[0].parameters())


def test_what_is_alike_needs_no_projection():
    teacher = made(convolutions(4))
    matching, loss = distance("hint 0 + attention 0 + relational 0", teacher, teacher, images(3))
    assert not list(matching.parameters())
    assert loss.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("widths", [(5, 7), (7, 5)])
def test_outputs_of_recurrent_layers_are_fitted(widths):
    student, teacher = (nn.Sequential(nn.GRU(3, width, batch_first=True)) for width in widths)
    matching, _ = distance("hint 0", student, teacher, torch.ones(2, 4, 3))
    assert matching.projections[0].weight.shape == tuple(reversed(widths))


class Attentive(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.attention = MultiHeadAttention(width, heads, width // heads, batch_first=True)

    def forward(self, steps):
        return self.attention(*[self.embed(steps)] * 3)[0]


def test_relations_of_attention_in_the_teachers_heads():
    torch.manual_seed(0)
    student, teacher = Attentive(4, 1), Attentive(8, 2)
    steps = torch.randn(2, 5, 3)
    _, loss = distance("0.5 * relations attention", student, teacher, steps)
    parts = [
        self_relation(*(getattr(model.attention, name)(model.embed(steps)) for model in (student, teacher)), heads=2)
        for name in ("query", "key", "value")
    ]
    torch.testing.assert_close(loss, 0.5 * sum(parts))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hint 0 -> 2", "no dimensions in common"),
        ("hint 0 -> 1", "differ in more"),
        ("attention 3", r"not both \[batch, channels"),
        ("relations 0", "has no module at '0.query'"),
        ("hint 9", "has no module"),
    ],
)
def test_points_that_cannot_be_matched_are_refused(text, words):
    student = nn.Sequential(
        nn.Unflatten(1, (2, 6)), nn.Flatten(), nn.Unflatten(1, (3, 4)), nn.Linear(4, 3), nn.Flatten()
    )
    teacher = nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Unflatten(1, (1, 3)), nn.Flatten(), nn.Flatten())
    if text == "hint 0 -> 1":
        teacher[1] = nn.Identity()
    if text == "attention 3":
        student[3], student[2] = nn.Identity(), nn.Identity()
    with pytest.raises(ModelError, match=words):
        Matching(terms(text), student, teacher, torch.ones(2, 12))
    assert hooks(student) == hooks(teacher) == 0


def test_a_module_that_is_not_called_is_refused():
    model = made(convolutions(4))
    model.spare = nn.Linear(1, 1)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    with pytest.raises(ModelError, match="does not call"):
        Matching(terms("hint spare"), model, model, images(2))


def task(labels):
    teacher = made(convolutions(6, 8))
    with torch.no_grad():
        batches = [(part, teacher(part).argmax(1)) for part in images(48).split(12)]
    train = batches if labels else [part for part, _ in batches]
    return teacher, Data(example=images(1), train=train, validate=batches)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "loss", ["hint 1", "attention 1", "relational 1", "dkd + hint 0 -> 1 + attention 0 + relational 3"]
)
def test_a_student_comes_nearer(loss, labels):
    teacher, data = task(labels)
    student = made(convolutions(4, 4))
    trained, _ = run(
        Distill(epochs=8, learning_rate=0.01, loss=loss, teacher_share=0.9),
        student,
        Context(data=data, teacher=teacher),
    )
    term = "relational 1" if loss.startswith("relational") else "attention 1"
    before, after = (distance(term, model, teacher, images(48))[1].item() for model in (student, trained))
    if loss != "hint 1":
        assert after < before
    else:
        assert not torch.equal(trained[1][0].weight, student[1][0].weight)
    assert hooks(trained) == hooks(teacher) == 0
    assert [type(module) for module in trained.modules()] == [type(module) for module in student.modules()]
    assert {name: value.shape for name, value in trained.state_dict().items()} == {
        name: value.shape for name, value in student.state_dict().items()
    }


def test_features_want_a_teacher():
    _, data = task(True)
    with pytest.raises(DataError, match="no teacher"):
        run(Distill(epochs=1, loss="hint 0"), made(convolutions(4, 4)), Context(data=data))
