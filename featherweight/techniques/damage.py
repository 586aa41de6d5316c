"""What a change of one layer costs: how far the network's output on calibration data is from what it was, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches, forward, select_output
from featherweight.edits import Edit, apply
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.imitation import output_kind

_TINY = 1e-12


class Damage:
    """Compares a model's outputs with those of the model as it was when this was made.

    Classes are compared by the Kullback-Leibler divergence in nats, labels of yes or no each by that of each, and values by
    the squared error as a share of their variance.

    Args:
        model: run in evaluation mode; it comes back as it was.
        context: calibration data, loss and device.
        count: batches to read.
        outputs: of the model for these batches, where they are known.

    Raises:
        DataError: there is no calibration data.
    """

    def __init__(self, model: nn.Module, context: Context, count: int, outputs: Sequence[Any] | None = None) -> None:
        self._context, self._count = context, count
        self._kind = output_kind(context.data.loss)
        self._wanted = self._outputs(model) if outputs is None else [self._selected(output) for output in outputs]

    def of(self, model: nn.Module) -> float:
        """Return the mean divergence of the model's outputs; 0 for the model itself."""
        pairs = list(zip(self._wanted, self._outputs(model), strict=True))
        if self._kind == "values":
            everything = torch.cat([wanted.flatten() for wanted, _ in pairs])
            error = sum(float((given - wanted).square().sum()) for wanted, given in pairs) / everything.numel()
            return error / max(float(everything.var(correction=0)), _TINY)
        total = sum(float(_divergence(wanted, given, self._kind).sum()) for wanted, given in pairs)
        return total / sum(len(wanted) for wanted, _ in pairs)

    def of_edits(self, model: nn.Module, edits: Iterable[Edit]) -> float:
        """Return the divergence of the model with these edits, which are taken back."""
        undo = [apply(model, edit) for edit in edits]
        try:
            return self.of(model)
        finally:
            for back in reversed(undo):
                back()

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        found = []
        with evaluating(model):
            for inputs, _ in islice(
                batches(self._context.data.calibrate, "calibrate", self._context.device), self._count
            ):
                found.append(self._selected(forward(model, inputs)))
        return found

    def _selected(self, output: Any) -> Tensor:
        return select_output(output, self._context.data.output).double()


def damage_table(
    model: nn.Module, context: Context, treatments: Sequence[tuple[str, str, Sequence[Edit], int]], count: int
) -> list[dict[str, Any]]:
    """Return what each treatment alone costs, as rows of plain data: `path`, `treatment`, `bytes`, `damage`.

    Args:
        model: comes back as it was.
        context: calibration data, loss and device.
        treatments: path, name, edits, and bytes that the layer takes then.
        count: calibration batches to read.
    """
    damage = Damage(model, context, count)
    return [
        {"path": path, "treatment": name, "bytes": size, "damage": damage.of_edits(model, edits)}
        for path, name, edits, size in treatments
    ]


def _divergence(wanted: Tensor, given: Tensor, kind: str) -> Tensor:
    """Of each sample, `[batch]`."""
    if kind == "labels":
        chances = torch.sigmoid(wanted)
        lost = F.binary_cross_entropy_with_logits(given, chances, reduction="none")
        kept = F.binary_cross_entropy_with_logits(wanted, chances, reduction="none")
        return (lost - kept).flatten(1).mean(1) if wanted.dim() > 1 else lost - kept
    logs = F.log_softmax(wanted, 1)
    gap = (logs.exp() * (logs - F.log_softmax(given, 1))).sum(1)
    return gap.flatten(1).mean(1) if gap.dim() > 1 else gap
