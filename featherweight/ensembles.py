"""Several models as one teacher, and several students that teach each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Data, forward, rebuild, select_output, split_batch, tensors
from featherweight.errors import ModelError
from featherweight.scoring import loss_function


class Ensemble(nn.Module):
    """Averages the outputs of its members; made by `ensemble`."""

    def __init__(self, members: Iterable[nn.Module], classes: bool) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.classes = classes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the average, in the structure that a member returns."""
        outputs = [member(*args, **kwargs) for member in self.members]
        parts = zip(*(tensors(output) for output in outputs), strict=True)
        return rebuild(outputs[0], [self._average(torch.stack(part)) for part in parts])

    def _average(self, parts: Tensor) -> Tensor:
        if not self.classes:
            return parts.mean(0)
        return F.log_softmax(parts, 2).logsumexp(0) - torch.tensor(float(len(parts)), device=parts.device).log()


def ensemble(models: Iterable[nn.Module], classes: bool = True) -> Ensemble:
    """Return one model that averages several, to be a teacher: `compress(student, ..., teacher=ensemble(models))`.

    Bucila, Caruana & Niculescu-Mizil, "Model Compression", KDD 2006.

    Args:
        models: with outputs of the same structure and shapes.
        classes: whether outputs are logits with classes on dimension 1: their probabilities are averaged, and the logarithm of
            the average comes out, which is again logits. Otherwise the outputs themselves are averaged.

    Raises:
        ModelError: there is no model.
    """
    members = list(models)
    if not members:
        raise ModelError("ensemble([]) has no model to average: give at least one")
    return Ensemble(members, classes)


def mutual(data: Data, share: float = 0.5) -> Callable[[nn.Module, Any], Tensor]:
    """Return a `Data.step` with which the members of an ensemble learn from the labels and from each other, all at once.

    Train `ensemble(students)` with `Distill` and `replace(data, step=mutual(data))`; its `members` are the result. Outputs
    are logits with classes on dimension 1. Zhang et al., "Deep Mutual Learning", CVPR 2018.

    Args:
        data: whose `loss` and `output` are used.
        share: weight of what the others say, 0 to 1; without targets they are all there is.
    """
    labelled = loss_function(data)

    def step(model: nn.Module, batch: Any) -> Tensor:
        inputs, target = split_batch(batch)
        outputs = [forward(member, inputs) for member in _members(model)]
        logs = [F.log_softmax(select_output(output, data.output), 1) for output in outputs]
        losses = []
        for own, output in enumerate(outputs):
            others = torch.stack([log for other, log in enumerate(logs) if other != own]).detach().exp().mean(0)
            imitated = (torch.special.xlogy(others, others) - others * logs[own]).sum(1).mean()
            weight = 1.0 if target is None else share
            losses.append(weight * imitated + ((1 - weight) * labelled(output, target) if weight < 1 else 0.0))
        return torch.stack(losses).sum()

    return step


def _members(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, Ensemble) or len(model.members) < 2:
        raise ModelError(f"mutual learning wants an ensemble of two models or more and got a {type(model).__name__}")
    return list(model.members)
