"""What a change of one layer costs: how far the network's output on calibration data is from what it was, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
_FEW, _SURE = 8, 3.0  # samples at least, and standard errors, after which a mean is known to be below a limit


class Damage:
    """Compares a model's outputs with those of the model as it was when this was made.

    Classes are compared by the Kullback-Leibler divergence in nats, labels of yes or no each by that of each, and values by
    the squared error as a share of their variance.

    Args:
        model: run in evaluation mode; it comes back as it was.
        context: calibration data, loss and device.
        count: batches to read.
        outputs: of the model for these batches, where they are known.
        skip: how many of the batches are left out at the beginning.

    Raises:
        DataError: there is no calibration data.
    """

    def __init__(
        self, model: nn.Module, context: Context, count: int, outputs: Sequence[Any] | None = None, skip: int = 0
    ) -> None:
        self._context, self._read = context, (skip, count)
        self._kind = output_kind(context.data.loss)
        self._wanted = list(self._outputs(model)) if outputs is None else [self._selected(one) for one in outputs]
        self._unit = 1.0
        if self._kind == "values":
            self._unit = max(float(torch.cat([wanted.flatten() for wanted in self._wanted]).var(correction=0)), _TINY)

    def of(self, model: nn.Module, enough: float = 0.0) -> float:
        """Return the mean divergence of the model's outputs over samples; 0 for the model itself.

        Args:
            model: compared.
            enough: a mean is good enough below this: no more batches are read once those read leave no doubt.
        """
        found = list[Tensor]()
        for wanted, given in zip(self._wanted, self._outputs(model), strict=True):
            found.append(_divergence(wanted, given, self._kind) / self._unit)
            known = torch.cat(found)
            if len(known) >= _FEW and float(known.mean() + _SURE * known.std() / len(known) ** 0.5) < enough:
                break
        return float(torch.cat(found).mean())

    def of_edits(self, model: nn.Module, edits: Iterable[Edit]) -> float:
        """Return the divergence of the model with these edits, which are taken back."""
        undo = [apply(model, edit) for edit in edits]
        try:
            return self.of(model)
        finally:
            for back in reversed(undo):
                back()

    def _outputs(self, model: nn.Module) -> Iterator[Tensor]:
        some = islice(batches(self._context.data.calibrate, "calibrate", self._context.device), *self._read)
        for inputs, _ in some:
            with evaluating(model):
                output = forward(model, inputs)
            yield self._selected(output)

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
    """Of each sample, `[batch]`; of values the squared error."""
    if kind == "values":
        gap = (given - wanted).square()
    elif kind == "labels":
        chances = torch.sigmoid(wanted)
        gap = F.binary_cross_entropy_with_logits(given, chances, reduction="none")
        gap -= F.binary_cross_entropy_with_logits(wanted, chances, reduction="none")
    else:
        logs = F.log_softmax(wanted, 1)
        gap = (logs.exp() * (logs - F.log_softmax(given, 1))).sum(1)
    return gap.flatten(1).mean(1) if gap.dim() > 1 else gap
