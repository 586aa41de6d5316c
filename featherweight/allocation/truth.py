"""True evaluations: by how much the output of a changed network diverges from what it was, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Inputs, batches, forward, rebuild, samples, select_output, tensors
from featherweight.edits import Write, apply
from featherweight.errors import DataError
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.imitation import output_kind


class Reference:
    """The outputs of a network on some calibration data.

    Args:
        model: the network; it is read once, and stays as it is.
        context: calibration data, loss and device.
        most: samples to read.

    Raises:
        DataError: there is no calibration data.
    """

    def __init__(self, model: nn.Module, context: Context, most: int) -> None:
        self.context, self.kind = context, output_kind(context.data.loss)
        self.read: list[Inputs] = []
        left = most
        for inputs, _ in batches(context.data.calibrate, "calibrate", context.device):
            if left <= 0:
                break
            taken = rebuild(inputs, [value[:left] for value in tensors(inputs)])
            self.read.append(taken)
            left -= samples(taken)
        if not self.read:
            raise DataError("Data.calibrate is empty: damage is measured on it")
        self.wanted = list(self._outputs(model))

    def divergence(self, model: nn.Module) -> float:
        """Return the mean divergence of a network from the reference, in nats, at least 0; infinite where outputs are no numbers.

        Kullback and Leibler's for classes and for labels of yes or no; half the squared error, summed over the values of a
        sample, for values.
        """
        total, count = 0.0, 0
        for given, wanted in zip(self._outputs(model), self.wanted, strict=True):
            total += float(self._divergence(given, wanted))
            count += len(wanted)
        return max(0.0, total / max(1, count)) if math.isfinite(total) else math.inf

    def changed(self, model: nn.Module, values: Mapping[str, Tensor]) -> float:
        """Return the divergence of the network with other values of some tensors; it comes back as it was."""
        with written(model, values):
            return self.divergence(model)

    def _outputs(self, model: nn.Module) -> Iterator[Tensor]:
        with evaluating(model):
            for inputs in self.read:
                output = select_output(forward(model, inputs), self.context.data.output).double()
                if self.kind == "classes" and output.dim() > 1:
                    output = output.movedim(1, -1).reshape(-1, output.shape[1])
                yield output

    def _divergence(self, given: Tensor, wanted: Tensor) -> Tensor:
        if self.kind == "classes" and given.dim() > 1:
            return F.kl_div(F.log_softmax(given, 1), F.log_softmax(wanted, 1), reduction="sum", log_target=True)
        if self.kind == "labels":
            chances = torch.sigmoid(wanted)
            apart = F.binary_cross_entropy_with_logits(given, chances, reduction="sum")
            return apart - F.binary_cross_entropy_with_logits(wanted, chances, reduction="sum")
        return 0.5 * (given - wanted).square().sum()


@contextmanager
def written(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give tensors of a model other values for a while."""
    undo = apply(model, Write(values))
    try:
        yield
    finally:
        undo()
