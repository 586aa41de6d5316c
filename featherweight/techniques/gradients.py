"""What the loss makes of each weight on calibration data: gradients, batch by batch, with labels or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches, forward, select_output
from featherweight.modes import evaluating
from featherweight.scoring import loss_function
from featherweight.technique import Context
from featherweight.techniques.imitation import output_kind


def gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], context: Context, count: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of the task's loss by name, once for each calibration batch, in evaluation mode.

    Without labels the targets are drawn from what the teacher, or else the model itself, predicts: its own output as target
    would have no gradient at all, and drawn targets give the Fisher matrix itself.

    Args:
        model: comes back as it was, frozen weights and gradients included.
        weights: parameters of the model; one that has no part in the loss is missing in what is yielded.
        context: gives calibration data, loss, teacher, seed and device.
        count: how many calibration batches to read.

    Raises:
        DataError: there is no calibration data, or it does not fit the loss.
    """
    draw = context.rng("targets")
    with evaluating(model), torch.enable_grad(), _differentiable(list(weights.values())):
        for inputs, target in islice(batches(context.data.calibrate, "calibrate", context.device), count):
            loss = _loss(model, context, inputs, target, draw)
            if not loss.requires_grad:  # none of the weights has a part in it
                yield {}
                continue
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            yield {name: value for name, value in zip(weights, found, strict=True) if value is not None}


@contextmanager
def _differentiable(weights: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to frozen weights too, and through recurrent layers in evaluation mode, which cuDNN refuses."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


def _loss(model: nn.Module, context: Context, inputs: Any, target: Any, draw: torch.Generator) -> Tensor:
    """The task's loss, or without labels that against drawn targets."""
    data = context.data
    if data.step is not None:
        return data.step(model, (inputs, target))
    if target is not None:
        return loss_function(data)(forward(model, inputs), target)
    student = select_output(forward(model, inputs), data.output)
    with torch.no_grad():
        taught = model if context.teacher is None else context.teacher
        wanted = select_output(forward(taught, inputs), data.output)
    kind = output_kind(data.loss)
    if kind == "classes" and wanted.dim() > 1:
        chances = F.softmax(wanted, 1).movedim(1, -1).flatten(0, -2).cpu()
        labels = torch.multinomial(chances, 1, generator=draw).reshape(wanted.movedim(1, -1).shape[:-1])
        return F.cross_entropy(student, labels.to(student.device))
    if kind == "labels":
        answers = torch.bernoulli(torch.sigmoid(wanted).cpu(), generator=draw)
        return F.binary_cross_entropy_with_logits(student, answers.to(student.device))
    noise = torch.randn(wanted.shape, generator=draw).to(wanted)
    return F.mse_loss(student, wanted + noise)
