"""The loss of one batch in training: the task's own, what the teacher says, or both in a mix that may move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import example_inputs, forward, select_output
from featherweight.errors import DataError
from featherweight.scoring import loss_function
from featherweight.technique import Context
from featherweight.techniques.autocasting import Autocast
from featherweight.techniques.imitation import imitation, output_kind
from featherweight.techniques.matching import Matching, Term, captured, terms
from featherweight.techniques.seeding import seeded

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
        self._autocast = Autocast(model, context.device)

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
        with captured(self._model, self._matching.student_paths) as seen:
            output = self._autocast.run(forward, self._model, inputs)
        if target is not None and context.teacher is None:
            return self._task(output, target)
        if target is None:
            return self._imitated(inputs, output, target, seen, done)
        share = self._weight(done)
        loss = self._task(output, target) * (1 - share) if share < 1 else torch.zeros((), device=context.device)
        return loss + share * self._imitated(inputs, output, target, seen, done) if share > 0 else loss

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
        with torch.no_grad(), captured(teacher, self._matching.teacher_paths) as wanted_seen:
            wanted = self._autocast.run(forward, teacher, inputs)
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
