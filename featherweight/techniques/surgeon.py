"""Optimal brain surgeon over units: what leaving costs when the layers behind make the best of what is left.

Papers: Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992; for structures: Kurtic
et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from featherweight.edits import module_at
from featherweight.errors import ModelError
from featherweight.graph import CoupledGroup
from featherweight.technique import Context
from featherweight.techniques.moments import LAYERS, ROWS, second_moments
from featherweight.techniques.targets import norm_pairs

_RIDGE = 1e-3  # of the mean second moment, so that inputs that never vary can be inverted
_WIDEST = 5120  # inputs of one layer
_ENTRIES = 1 << 27  # of second moments held at once: a gigabyte


def removal_errors(
    model: nn.Module, groups: Sequence[CoupledGroup], context: Context, count: int
) -> list[Tensor | None]:
    """Return for each unit the squared output error it adds when it leaves, in the order in which units leave best.

    The error is that of the layers that read the units, summed over their outputs and averaged over calibration data, after
    the remaining inputs have been refitted by least squares; behind a batch norm it is measured on the norm's scale. So it
    is the error of what is added to the residual stream, and compares across groups.

    Args:
        model: comes back as it was.
        groups: of this model.
        context: calibration data and device.
        count: calibration batches to read.

    Returns:
        `[units]` float64 for each group; None for one that no dense layer of at most 5,120 inputs reads.

    Raises:
        DataError: there is no calibration data.
    """
    scale = _scales(model, context)
    errors: list[Tensor | None] = [None] * len(groups)
    for places, names in _chunks(model, groups):
        moments = second_moments(model, context, sorted({name.rpartition(".")[0] for name in names}), count, ROWS)
        for place in places:
            readers = []
            for member, (name, dim) in enumerate(groups[place].members):
                moment = moments.get(name)
                if dim == 1 and moment is not None and len(moment) == 1:
                    readers.append(_Reader(_weight(model, name), scale.get(name), moment[0], groups[place], member))
            errors[place] = _leave_one_by_one(readers, len(groups[place])) if readers else None
    return errors


class _Reader:
    """One weight that reads the units: its columns by unit, and the inverse second moment of what is left of its inputs."""

    def __init__(self, weight: Tensor, scale: Tensor | None, moment: Tensor, group: CoupledGroup, member: int) -> None:
        area = weight[0, 0].numel()
        owned = torch.tensor([unit[member] for unit in group.units], device=moment.device)
        self.columns = (owned[:, :, None] * area + torch.arange(area, device=moment.device)).flatten(1)
        flat = weight.detach().flatten(1).to(moment)
        self.weight = flat if scale is None else flat * scale.to(moment)[:, None]
        ridge = _RIDGE * moment.diagonal().mean().clamp_min(1e-30)
        self.inverse = torch.linalg.inv(moment + ridge * torch.eye(len(moment)).to(moment))

    def errors(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error of each unit left, `[left]`, and the block each is compensated with."""
        columns = self.columns[left]
        blocks = torch.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
        own = self.weight[:, columns].transpose(0, 1)  # [left, out, columns]
        return ((own @ blocks) * own).sum((1, 2)), blocks

    def remove(self, unit: int, block: Tensor) -> None:
        """Take one unit out and refit the others."""
        columns = self.columns[unit]
        gain = block @ self.inverse[columns]
        self.weight = self.weight - self.weight[:, columns] @ gain
        self.inverse = self.inverse - self.inverse[:, columns] @ gain
        # what has left must not be read again; ones keep the matrix regular
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0
        self.inverse[columns, columns] = 1.0
        self.weight[:, columns] = 0.0


def _leave_one_by_one(readers: Sequence[_Reader], units: int) -> Tensor:
    errors = torch.zeros(units, dtype=torch.float64)
    left = torch.arange(units, device=readers[0].inverse.device)
    while len(left):
        each = [reader.errors(left) for reader in readers]
        total = torch.stack([found for found, _ in each]).sum(0)
        best = int(total.argmin())
        unit = int(left[best])
        errors[unit] = float(total[best].clamp_min(0.0))
        for reader, (_, blocks) in zip(readers, each, strict=True):
            reader.remove(unit, blocks[best])
        left = torch.cat((left[:best], left[best + 1 :]))
    return errors


def _chunks(model: nn.Module, groups: Sequence[CoupledGroup]) -> Iterator[tuple[list[int], set[str]]]:
    """Yield groups and the weights that read them, so many at a time that their second moments fit."""
    places: list[int] = []
    names: set[str] = set()
    for place, group in enumerate(groups):
        readers = {
            name
            for name, dim in group.members
            if dim == 1
            and type(module_at(model, name.rpartition(".")[0])) in LAYERS
            and _inputs(model, name) <= _WIDEST
        }
        if names and sum(_inputs(model, name) ** 2 for name in names | readers) > _ENTRIES:
            yield places, names
            places, names = [], set()
        if readers:
            places.append(place)
            names |= readers
    if places:
        yield places, names


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name)


def _inputs(model: nn.Module, name: str) -> int:
    return _weight(model, name)[0].numel()


def _scales(model: nn.Module, context: Context) -> dict[str, Tensor]:
    """What the batch norm behind a layer multiplies each of its outputs by, by the name of the layer's weight."""
    scales = {}
    try:
        for norm_path, path in norm_pairs(model, context):
            norm = module_at(model, norm_path)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
                gain = norm.weight.detach() if norm.affine else torch.ones_like(norm.running_var)
                scales[f"{path}.weight"] = gain / torch.sqrt(norm.running_var + norm.eps)
    except ModelError:
        return {}
    return scales
