"""Batch norms whose statistics fit the model as it is now: what every cut and every new weight upstream leaves wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, final

from torch import Tensor, nn

from featherweight.data import batches, forward, samples
from featherweight.edits import Write
from featherweight.errors import DataError
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Technique, setting

Norm = tuple[str, nn.modules.batchnorm._BatchNorm]

_STILL = 1e-3  # of a norm's eps: a variance below is none
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@final
@dataclass(frozen=True)
class ReestimateNorms(Technique):
    """Replace the running statistics of the batch norms by what calibration batches say; nothing is trained.

    They are the averages over the batches; or, `relative`, where the original has the very same norms, the statistics of the
    original, changed as the averages differ between it and the model. So a few batches, without the augmentation of the
    training, say what was lost on the way and leave the rest alone. Batches of one sample are passed over, since their variance
    says nothing.

    Paper: Li et al., "Adaptive Batch Normalization", 2016; after pruning: Li et al., "EagleEye", ECCV 2020.
    Use when: after a cut, before judging or healing it, and after rounding weights; useless once batch norms are folded.
    Costs: one pass over `batches` calibration batches, and one of the original.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    batches: int = setting(64, low=1, high=100_000)
    relative: bool = setting(True)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write of the running means and variances of every norm in scope that calibration data reaches."""
        norms: list[Norm] = []
        for path, norm in context.targets(model, *_NORMS):
            if norm.running_mean is None:
                context.leave(path, "it keeps no running statistics")
            else:
                norms.append((path, norm))
        if not norms:
            context.leave("", "no batch norm with running statistics is in scope")
            return
        state = _averages(model, norms, context, self.batches)
        teacher = context.teacher
        if self.relative and teacher is not None and (before := _same(teacher, norms)):
            state = _moved(state, before, _averages(teacher, before, context, self.batches))
        for path, _ in norms:
            if f"{path}.running_mean" not in state:
                context.leave(path, "calibration data does not reach it")
        if state:
            yield Write(state)


def _same(original: nn.Module, norms: Sequence[Norm]) -> list[Norm]:
    """The norms of the original at the same paths, or none where one is missing or of another width."""
    modules, found = dict(original.named_modules()), list[Norm]()
    for path, norm in norms:
        old = modules.get(path)
        if not isinstance(old, type(norm)) or old.num_features != norm.num_features or old.running_mean is None:
            return []
        found.append((path, old))
    return found


def _moved(state: Mapping[str, Tensor], norms: Sequence[Norm], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of the original's norms with which the changed model's outputs are on the same scale as before."""
    found = dict(state)
    for path, norm in norms:
        mean, var = f"{path}.running_mean", f"{path}.running_var"
        if mean not in state or mean not in averages:
            continue
        kept_mean, kept_var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        least = _STILL * norm.eps
        ratio = (state[var] + least) / (averages[var] + least)
        found[mean] = state[mean] - (averages[mean] - kept_mean) * ratio.sqrt()
        found[var] = ((kept_var + norm.eps) * ratio - norm.eps).clamp_min(0)
    return found


def _averages(model: nn.Module, norms: Sequence[Norm], context: Context, count: int) -> dict[str, Tensor]:
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
