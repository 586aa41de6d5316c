"""The loss of one batch in training: the task's own, what the teacher says, or both in a mix that may move."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import example_inputs, forward, rebuild, select_output
from featherweight.data import tensors as all_tensors
from featherweight.errors import DataError, RecipeError
from featherweight.scoring import loss_function
from featherweight.technique import Context
from featherweight.techniques.imitation import imitation, output_kind
from featherweight.techniques.matching import Matching, Term, captured, terms
from featherweight.techniques.seeding import seeded

_PRECISION = "FEATHERWEIGHT_TRAINING"  # the environment variable that decides instead of the device
_DKD_WARM_UP = 1 / 12  # of the training, as 20 of 240 epochs in the paper


@dataclass(frozen=True)
class Guidance:
    """How the teacher is followed.

    Attributes:
        loss: a sum of losses on outputs and features; see `matching.terms`.
        mixing: of the teacher's part with the task's loss: `"fixed"` at `teacher_share`, `"falling"` in a line from 1 to it
            or `"rising"` from it to 1 over the training, or `"learnt"` from there by gradient descent through a sigmoid.
    """

    loss: str = "soft_targets"
    mixing: str = "fixed"


class Lesson:
    """What a model is to learn from a batch.

    Args:
        model: in training.
        context: data, teacher, seed and device.
        guidance: how the teacher is followed.
        share: weight of the teacher's part, 0 to 1.
        temperature: softness of the teacher's probabilities.

    Raises:
        DataError: features are to be matched and there is no teacher.
        ModelError: features cannot be matched.
        RecipeError: the environment asks for a precision that is none.
    """

    def __init__(
        self, model: nn.Module, context: Context, guidance: Guidance, share: float, temperature: float
    ) -> None:
        self._model, self._context, self._mixing = model, context, guidance.mixing
        self._share, self._temperature = share, temperature
        self._task = loss_function(context.data)
        self._terms = terms(guidance.loss)
        self._matching = _matching(self._terms, model, context)
        self._balance = nn.Parameter(torch.tensor(share, device=context.device).logit(eps=0.01))
        self._bfloat16 = _in_bfloat16(model, context.device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained beside the model and dropped afterwards, by name."""
        yield from self._matching.named_parameters()
        if self._mixing == "learnt":
            yield "balance", self._balance

    def loss(self, inputs: Any, target: Any, done: float) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            inputs: of the model.
            target: of the task's loss, or None.
            done: share of the training before this step, 0 to 1.

        Raises:
            DataError: there are neither targets nor a teacher.
        """
        context = self._context
        if context.data.step is not None:
            return context.data.step(self._model, (inputs, target))
        with captured(self._model, self._matching.student_paths) as seen, self._autocast():
            output = forward(self._model, inputs)
        if self._bfloat16:
            output = rebuild(output, [value.float() for value in all_tensors(output)])
        if target is not None and context.teacher is None:
            return self._task(output, target)
        if target is None:
            return self._imitated(inputs, output, target, seen, done)
        share = self._weight(done)
        loss = self._task(output, target) * (1 - share) if share < 1 else torch.zeros((), device=context.device)
        return loss + share * self._imitated(inputs, output, target, seen, done) if share > 0 else loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._context.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _weight(self, done: float) -> float | Tensor:
        """The weight of the teacher's part now."""
        share = self._share
        if self._mixing == "learnt":
            return self._balance.sigmoid()
        if self._mixing == "fixed":
            return share
        return share + (1 - share) * (done if self._mixing == "rising" else 1 - done)

    def _imitated(self, inputs: Any, output: Any, target: Any, seen: dict[str, Tensor], done: float) -> Tensor:
        """The teacher's part of the loss: every term of the sum."""
        context, teacher = self._context, self._context.teacher
        if teacher is None:
            raise DataError("Data.train has no targets and there is no teacher: healing needs one of them")
        with torch.no_grad(), captured(teacher, self._matching.teacher_paths) as wanted_seen, self._autocast():
            wanted = forward(teacher, inputs)
        student, followed = (select_output(part, context.data.output).float() for part in (output, wanted))
        loss = self._matching(seen, wanted_seen) if self._matching.pairs else student.new_zeros(())
        kind = output_kind(context.data.loss)
        for term in self._terms:
            if not term.student:
                warmth = min(1.0, done / _DKD_WARM_UP)
                loss = loss + term.weight * imitation(
                    student, followed, kind, self._temperature, term.loss, target, warmth
                )
        return loss


def _matching(found: tuple[Term, ...], model: nn.Module, context: Context) -> Matching:
    """The losses on features, their projections drawn from the context's seed.

    Raises:
        DataError: there are such losses and no teacher.
    """
    points = [term for term in found if term.student]
    if points and context.teacher is None:
        raise DataError(
            f"{points[0].loss} {points[0].student} compares features with a teacher's, and there is no teacher"
        )
    teacher = context.teacher if context.teacher is not None else model
    inputs = example_inputs(context.data, context.device) if points else ()
    with seeded(context.draw("projections")):
        return Matching(points, model, teacher, inputs)


def _in_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Whether forward passes of a training are to be in bfloat16: as the environment says, otherwise where it pays.

    Raises:
        RecipeError: the environment names no such precision.
    """
    asked = os.environ.get(_PRECISION, "auto")
    if asked not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"{_PRECISION} is {asked!r}; it may be auto, float32 or bfloat16")
    return asked == "bfloat16" or (asked == "auto" and _mixed_precision_pays(model, device))


def _mixed_precision_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether bfloat16 trains faster: on GPUs, on CPUs with matrix units, and where convolutions lie channels-last.

    With plain AVX-512, ResNet-56 and VGG-19 gained 1.5 times laid out like this, and everything else lost.
    """
    if device.type != "cpu":
        return device.type == "cuda"
    can = torch.cpu.get_capabilities()
    if can.get("amx_bf16", False):
        return True
    last = torch.channels_last
    lies = any(
        p.dim() == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in model.parameters()
    )
    return lies and bool(can.get("avx512_bf16", False))
