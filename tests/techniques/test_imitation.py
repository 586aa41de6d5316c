"""Distillation losses against cases worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.techniques import imitation as losses
from featherweight.techniques.imitation import imitation

EVEN, SKEWED = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
SKEW = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # their divergence


def close(value, wanted):
    assert value.item() == pytest.approx(wanted, abs=1e-5)


def test_dkd_of_two_classes_is_the_target_part_alone():
    for beta in (0.0, 8.0):
        close(losses.dkd(EVEN, SKEWED, torch.tensor([0]), 1.0, beta=beta), SKEW)
    close(losses.dkd(EVEN, SKEWED * 2, torch.tensor([1]), 2.0), 4 * SKEW)


def test_dkd_of_three_classes():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, math.log(3), 0.0]])  # 1/5, 3/5, 1/5
    target = 0.2 * math.log(0.6) + 0.8 * math.log(1.2)
    labels = torch.tensor([0])
    close(losses.dkd(student, teacher, labels, 1.0, alpha=1, beta=0), target)
    close(losses.dkd(student, teacher, labels, 1.0, alpha=0, beta=1), SKEW)
    close(losses.dkd(student, teacher, labels, 1.0, alpha=2, beta=3), 2 * target + 3 * SKEW)
    whole = 0.2 * math.log(0.6) + 0.6 * math.log(1.8) + 0.2 * math.log(0.6)
    close(losses.dkd(student, teacher, labels, 1.0, alpha=1, beta=0.8), whole)


@pytest.mark.parametrize("missing", [None, torch.tensor([-100]), torch.tensor([[0.1, 0.9, 0.0]])], ids=str)
def test_dkd_without_a_label_takes_the_teachers_best_class(missing):
    student, teacher = torch.tensor([[0.5, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    got, wanted, other = (
        imitation(student, teacher, "classes", 1.0, "dkd", target)
        for target in (missing, torch.tensor([1]), torch.tensor([0]))
    )
    assert torch.equal(got, wanted)
    assert not torch.equal(got, other)


def test_dkd_warms_up_and_weighs_by_the_number_of_classes():
    full = imitation(EVEN, SKEWED, "classes", 1.0, "dkd")
    close(imitation(EVEN, SKEWED, "classes", 1.0, "dkd", warmth=0.25), full.item() / 4)
    assert [losses.non_target_weight(count) for count in (2, 10, 100)] == [1.0, 2.0, 8.0]


def test_dist():
    """The first sample is turned round (correlation -1), the second is not; both classes follow the teacher over the batch."""
    student = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    teacher = torch.tensor([[0.3, 0.7], [0.1, 0.9]])
    close(losses.dist(student, teacher), 1.0)
    close(losses.dist(student, teacher, between=0.0), 0.0)
    close(losses.dist(student, teacher.flip(0), between=0.0, within=3.0), 6.0)
    close(losses.dist(student[1:], teacher[1:]), 0.0)
    logits = torch.log(student), torch.log(teacher)
    close(imitation(*logits, "classes", 1.0, "dist"), 1.0)
    close(imitation(2 * logits[0], 2 * logits[1], "classes", 2.0, "dist"), 4.0)


def test_hint():
    close(losses.hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])), 4.5)


def test_attention_transfer():
    student = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])  # two channels, map (1, 0)
    teacher = torch.tensor([[[[3.0, -4.0]]]])  # one channel, map (9, 16)
    close(losses.attention_transfer(student, teacher), 2 - 2 * 9 / math.hypot(9, 16))
    close(losses.attention_transfer(student, 7 * student), 0.0)


def test_relational():
    """Points at 0, 1, 2 against a right triangle of sides 3, 4, 5."""
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    distances = 2 * (0.5 * 0.5**2 + 0.5 * 0.5**2) / 9  # 3/4 3/2 3/4 against 3/4 1 5/4
    angles = 2 * (0.5 * 1.0**2 + (1.6 - 0.5) + 0.5 * 0.2**2) / 27  # cosines 1, -1, 1 against 0, 0.6, 0.8
    close(losses.relational(student, teacher, angles=0.0), distances)
    close(losses.relational(student, teacher), distances + 2 * angles)
    close(losses.relational(teacher @ torch.tensor([[0.0, 5.0], [-5.0, 0.0]]), teacher + 1), 0.0)


@pytest.mark.parametrize("same", [True, False])
def test_relational_has_gradients_where_samples_coincide(same):
    student = torch.zeros(3, 2) if same else torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
    student.requires_grad_()
    losses.relational(student, torch.eye(3)).backward()
    assert torch.isfinite(student.grad).all()


def test_self_relation():
    student, teacher = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [0.0]]])
    high = math.e / (1 + math.e)
    first = high * math.log(2 * high) + (1 - high) * math.log(2 * (1 - high))
    close(losses.self_relation(student, teacher), first / 2)
    doubled = teacher.repeat(1, 1, 2)
    close(losses.self_relation(torch.zeros(1, 2, 4), doubled, heads=2), first / 2)


def test_labels_of_yes_or_no():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), -math.log(3)]])
    for loss in ("soft_targets", "dkd"):
        close(imitation(student, teacher, "labels", 1.0, loss), math.log(2))
    close(imitation(student, 2 * teacher, "labels", 2.0), 4 * math.log(2))
    batch = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    close(imitation(batch, -batch, "labels", 1.0, "dist"), 4.0)


@pytest.mark.parametrize("loss", losses.OUTPUT_LOSSES[:-1])
def test_values_are_compared_by_squared_error(loss):
    close(imitation(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0]), "values", 3.0, loss), 4.5)


@pytest.mark.parametrize("loss", ["soft_targets", "dkd", "dist"])
def test_a_sequence_is_its_steps_as_samples(loss):
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=draw)
    target = torch.randint(0, 4, (3, 5), generator=draw)
    flat = [part.transpose(1, 2).reshape(15, 4) for part in (student, teacher)]
    got = imitation(student, teacher, "classes", 2.0, loss, target)
    close(got, imitation(*flat, "classes", 2.0, loss, target.flatten()).item())


@pytest.mark.parametrize("loss", [*losses.OUTPUT_LOSSES[1:-1]])
@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_the_teacher_itself_is_the_minimum(loss, kind):
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    student = teacher.clone().requires_grad_()
    imitation(student, teacher, kind, 2.0, loss).backward()
    assert student.grad.abs().max() < 1e-6
    off = imitation(teacher.flip(1), teacher, kind, 2.0, loss)
    assert off > imitation(teacher, teacher, kind, 2.0, loss)


def test_none_is_zero():
    close(imitation(EVEN, SKEWED, "classes", 1.0, "none"), 0.0)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("cross_entropy", "classes"),
        (F.cross_entropy, "classes"),
        (nn.CrossEntropyLoss(), "classes"),
        (nn.BCEWithLogitsLoss(), "labels"),
        (F.binary_cross_entropy_with_logits, "labels"),
        ("mse", "values"),
        (lambda output, target: output.sum(), "values"),
    ],
)
def test_what_an_output_is(loss, kind):
    assert losses.output_kind(loss) == kind
