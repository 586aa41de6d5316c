"""Batch norms whose statistics fit the model as it is now: what every cut and every new weight upstream leaves wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, final

from torch import Tensor, nn

from featherweight.data import batches, forward, samples
from featherweight.edits import Write
from featherweight.errors import DataError
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Technique, setting

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@final
@dataclass(frozen=True)
class ReestimateNorms(Technique):
    """Replace the running statistics of the batch norms by their averages over calibration batches; nothing is trained.

    Batches of one sample are passed over, since their variance says nothing.

    Paper: Li et al., "Adaptive Batch Normalization", 2016; after pruning: Li et al., "EagleEye", ECCV 2020.
    Use when: after a cut, before judging or healing it; useless once batch norms are folded.
    Costs: one pass over `batches` calibration batches.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    batches: int = setting(64, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write of the running means and variances of every norm in scope that calibration data reaches."""
        norms: list[tuple[str, nn.modules.batchnorm._BatchNorm]] = []
        for path, norm in context.targets(model, *_NORMS):
            if norm.running_mean is None:
                context.leave(path, "it keeps no running statistics")
            else:
                norms.append((path, norm))
        if not norms:
            context.leave("", "no batch norm with running statistics is in scope")
            return
        state = _averages(model, norms, context, self.batches)
        for path, _ in norms:
            if f"{path}.running_mean" not in state:
                context.leave(path, "calibration data does not reach it")
        if state:
            yield Write(state)


def _averages(
    model: nn.Module, norms: list[tuple[str, nn.modules.batchnorm._BatchNorm]], context: Context, count: int
) -> dict[str, Tensor]:
    """The statistics by name, averaged over batches; the model comes back as it was."""
    held = [{name: value.clone() for name, value in norm.named_buffers()} for _, norm in norms]
    momenta = [norm.momentum for _, norm in norms]
    state: dict[str, Tensor] = {}
    read = 0
    try:
        with evaluating(model):
            for _, norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches, each with the same weight
                norm.training = True
            for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), count):
                if samples(inputs) > 1:
                    forward(model, inputs)
                    read += 1
        for path, norm in norms:
            if norm.num_batches_tracked is not None and int(norm.num_batches_tracked):
                for name in ("running_mean", "running_var"):
                    state[f"{path}.{name}"] = norm.get_buffer(name).clone()
    except ValueError as error:
        raise DataError(f"Data.calibrate: batch statistics need more than one value a channel: {error}") from error
    finally:
        for (_, norm), values, momentum in zip(norms, held, momenta, strict=True):
            norm.momentum = momentum
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)
    if not read:
        raise DataError("Data.calibrate: every batch holds one sample, and batch statistics need at least two")
    return state
