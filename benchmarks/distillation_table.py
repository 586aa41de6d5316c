"""Students of three sizes on three data sets: trained alone, by soft targets, DKD, DIST and relations, with equal effort.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/distillation_table.py [--names mnist digits cifar10] [--students ...]
        [--methods ...]

Every row of a data set has the same epochs and augmentation, and its learning rate from one grid, by validation accuracy of seed
0; test accuracy of three seeds is what counts. The teacher is LeNet-5-Caffe, the LSTM of two layers of 256, or ResNet-56. A cell
that is done is kept, so that it runs in several sittings; rows are written once all data sets are done.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import cifar
import speech
import torch
from bytes_lenet import NETWORKS as LENETS
from networks import ResNet
from originals import cache, device, original
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Data, run
from featherweight.modes import answering
from featherweight.scoring import evaluate
from featherweight.tasks import mnist
from featherweight.techniques import Distill
from featherweight.techniques.matching import captured
from featherweight.techniques.seeding import seeded

NAME = "distillation_table"
SEEDS, RATES = (0, 1, 2), (1e-3, 3e-3, 1e-2)
GAIN = 1.0  # points over training alone that count
ALONE, SOFT = "alone", "soft targets"
METHODS = {  # the loss on what the teacher says
    ALONE: "none",
    SOFT: "soft_targets",
    "dkd": "0.25 * dkd",
    "dist": "0.5 * dist",
    "soft targets and relations": "soft_targets + {relations}",
}


class Listener(nn.Module):
    """LSTM layers of a width over log-mel frames and a linear layer on the last step."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(speech.BANDS, width, layers, batch_first=True)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of frames `[n, frames, 40]`."""
        return self.linear(self.lstm(x)[0][:, -1])


class Strided(nn.Module):
    """Four convolutions of 3 with norms, 32 to 256 channels, all but the third of stride 2; the mean over places, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 32, 2), (32, 64, 2), (64, 128, 1), (128, 256, 2))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in sizes
        )
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of images `[n, 3, 32, 32]`."""
        return self.linear(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def perceptron(*widths: int) -> nn.Module:
    """Return a perceptron 784-widths-10 with ReLU, on images `[n, 1, 28, 28]`."""
    sizes = (784, *widths)
    inner = [part for a, b in zip(sizes, widths, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(sizes[-1], 10))


@dataclass(frozen=True)
class Course:
    """One data set: its data, its teacher, its students by name, and how long they learn.

    Attributes:
        data: returns the data.
        teacher: returns the teacher, given them.
        students: return untrained students; below 100,000, 300,000 and 1,000,000 parameters.
        epochs: of every student.
        relations: the loss on features that goes with soft targets, by the paths of both networks.
    """

    data: Callable[[], Data]
    teacher: Callable[[Data], nn.Module]
    students: dict[str, Callable[[], nn.Module]]
    epochs: int
    relations: str


def _lenet5(data: Data) -> nn.Module:
    return original("lenet5", 0, LENETS["lenet5"].build, data, LENETS["lenet5"].training)


COURSES = {
    "mnist": Course(
        mnist.data,
        _lenet5,
        {
            "784-100-10": partial(perceptron, 100),
            "784-300-100-10": partial(perceptron, 300, 100),
            "784-600-300-10": partial(perceptron, 600, 300),
        },
        10,
        "0.1 * relational 2 -> 7",
    ),
    "digits": Course(
        speech.data,
        lambda _: speech.task().model,
        {f"{n} x {width}": partial(Listener, n, width) for n, width in ((1, 32), (2, 64), (2, 128), (2, 256))},
        20,
        "0.1 * relational lstm -> lstm",
    ),
    "cifar10": Course(
        cifar.data,
        lambda _: cifar.task("resnet56").model,
        {
            "ResNet-8": partial(ResNet, 1),
            "ResNet-20": partial(ResNet, 3),
            "4 convolutions": Strided,
        },
        6,
        "attention layer3 -> layer3",
    ),
}


class Remembering(nn.Module):
    """A teacher's outputs, kept by their inputs: students of one seed see the very same batches, whatever they learn from them.

    Args:
        teacher: is asked once a batch.
        point: a module of it whose output is kept too, and given again by a module of that name; none when empty.
    """

    def __init__(self, teacher: nn.Module, point: str = "") -> None:
        super().__init__()
        self.teacher, self.point = teacher, point
        self.answers: dict[bytes, tuple[Any, Tensor]] = {}
        self.add_module(point or "nothing", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Return what the teacher says of inputs `[n, ...]`."""
        key = hashlib.sha256(x.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()).digest()
        if key not in self.answers:
            with captured(self.teacher, [self.point] if self.point else []) as seen:
                output = self.teacher(x)
            self.answers[key] = seen.get(self.point), output
        features, output = self.answers[key]
        self.get_submodule(self.point or "nothing")(features)
        return output


class Lessons:
    """The cells of one data set: its data and teacher are made when the first of them is missing."""

    def __init__(self, name: str) -> None:
        self.name, self.course = name, COURSES[name]
        self._watched: tuple[int, Remembering] | None = None

    @cached_property
    def data(self) -> Data:
        """What teacher and students see."""
        return self.course.data()

    @cached_property
    def teacher(self) -> Remembering:
        """The teacher, on the device."""
        return Remembering(answering(self.course.teacher(self.data), device()))

    def asked(self, loss: str, seed: int) -> Remembering:
        """Return the teacher, which keeps outputs of all seeds, and features, which are large, of the last alone."""
        point = loss.partition("->")[2].strip()
        if not point:
            return self.teacher
        if self._watched is None or self._watched[0] != seed:
            self._watched = seed, Remembering(self.teacher.teacher, point)
        return self._watched[1]

    def learnt(self, student: str, method: str, rate: float, seed: int, place: str) -> dict[str, float]:
        """Train one student and return its accuracies."""
        with seeded(seed):
            model = self.course.students[student]()
        loss = METHODS[method].format(relations=self.course.relations)
        technique = Distill(
            epochs=self.course.epochs,
            learning_rate=rate,
            teacher_share=0.0 if method == ALONE else 0.9,
            temperature=4.0,
            loss=loss,
        )
        teacher = self.asked(loss, seed)
        context = Context(self.data, teacher, device(), seed, workspace=cache() / NAME / place, report=_say)
        model = run(technique, model, context).model.cpu()
        return {part: 100 * evaluate(model, self.data, part).value for part in ("validate", "test")}


def measured(
    name: str, done: dict[str, Any], students: list[str] | None = None, methods: list[str] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return the test accuracies of every student of a data set by method, one a seed, measured where they are missing.

    Args:
        name: of the data set.
        done: cells that are done.
        students: these alone; all when None.
        methods: these alone; all when None.
    """
    lessons, found = Lessons(name), {}

    def cell(student: str, method: str, rate: float, seed: int) -> dict[str, float]:
        key = f"{name} {student} {method} {rate:g} {seed}"
        if key not in done:
            done[key] = lessons.learnt(student, method, rate, seed, key.replace(" ", "_"))
            keep(NAME, {**kept(NAME), key: done[key]})
            sys.stdout.write(f"{key}: {done[key]}\n")
            sys.stdout.flush()
        return dict(done[key])

    for student in students or lessons.course.students:
        for method in methods or METHODS:
            rate = max(RATES, key=lambda rate: cell(student, method, rate, 0)["validate"])
            found.setdefault(student, {})[method] = [cell(student, method, rate, seed)["test"] for seed in SEEDS]
    return found


def gains(found: dict[str, dict[str, list[float]]], methods: tuple[str, ...]) -> dict[str, float]:
    """Return, for each student, the mean gain over training alone of the best of some methods, in points."""
    means = {student: {how: statistics.mean(values) for how, values in rows.items()} for student, rows in found.items()}
    return {student: max(rows[how] for how in methods) - rows[ALONE] for student, rows in means.items()}


def main() -> None:
    """Measure what is missing; write the rows when all data sets are done."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--names", nargs="*", choices=tuple(COURSES), default=list(COURSES))
    asked.add_argument("--students", nargs="*", help="of one data set; no rows are then written")
    asked.add_argument("--methods", nargs="*", choices=tuple(METHODS), help="these alone; no rows are then written")
    options = asked.parse_args()
    done = kept(NAME)
    tables = {name: measured(name, done, options.students, options.methods) for name in options.names}
    if set(tables) != set(COURSES) or options.students or options.methods:
        return
    others = tuple(method for method in METHODS if method not in (ALONE, SOFT))
    for row, methods in (("soft_targets", (SOFT,)), ("best_other", others)):
        best = {name: gains(found, methods) for name, found in tables.items()}
        reached = [name for name, by_student in best.items() if max(by_student.values()) >= GAIN]
        told = "; ".join(
            f"{name}: " + ", ".join(f"{student} {gain:+.2f}" for student, gain in by_student.items())
            for name, by_student in best.items()
        )
        note = (
            f"data sets where a student gains at least {GAIN:g} point over training alone by {' or '.join(methods)}; mean gain over "
            f"{len(SEEDS)} seeds in points of test accuracy: {told}"
        )
        record(NAME, f"distillation.sets.{row}", len(reached), len(SEEDS), note, tables)


def _say(message: str, _: float) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
