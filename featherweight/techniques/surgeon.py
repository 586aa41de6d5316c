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
_EMPTY = 0.2  # of a matrix, above which it is made smaller


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
    """One weight that reads the units: its columns, those of each unit together, and the inverse second moment of its inputs."""

    def __init__(self, weight: Tensor, scale: Tensor | None, moment: Tensor, group: CoupledGroup, member: int) -> None:
        area = weight[0, 0].numel()
        owned = torch.tensor([unit[member] for unit in group.units], device=moment.device)
        columns = (owned[:, :, None] * area + torch.arange(area, device=moment.device)).flatten(1)
        self.width = columns.shape[1]
        others = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
        others[columns] = False
        order = torch.cat((columns.flatten(), others.nonzero().flatten()))
        flat = weight.detach().flatten(1).to(moment)
        self.weight = (flat if scale is None else flat * scale.to(moment)[:, None])[:, order]
        ridge = _RIDGE * moment.diagonal().mean().clamp_min(1e-30)
        self.inverse = torch.linalg.inv(moment + ridge * torch.eye(len(moment)).to(moment))[order][:, order]

    def errors(self, units: int) -> tuple[Tensor, Tensor]:
        """Return the error of each of the units held, `[units]`, and the block that each is compensated with."""
        own = self.weight[:, : units * self.width]
        if self.width == 1:  # numbers, where a batch of matrices of one entry each would take most of the time
            gains = self.inverse.diagonal()[:units].reciprocal()
            return own.square().sum(0) * gains, gains[:, None, None]
        columns = torch.arange(units * self.width, device=self.inverse.device).view(units, self.width)
        blocks = torch.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
        own = own.reshape(-1, units, self.width).transpose(0, 1)  # [units, out, width]
        return ((own @ blocks) * own).sum((1, 2)), blocks

    def remove(self, place: int, block: Tensor) -> None:
        """Take the unit at a place out and refit the others."""
        columns = slice(place * self.width, (place + 1) * self.width)
        gain = block @ self.inverse[columns]
        self.weight.addmm_(self.weight[:, columns].clone(), gain, alpha=-1)
        self.inverse.addmm_(self.inverse[:, columns].clone(), gain, alpha=-1)
        # what has left must not be read again; ones keep the matrix regular
        self.inverse[columns] = 0.0
        self.inverse[:, columns] = 0.0
        self.inverse.diagonal()[columns] = 1.0
        self.weight[:, columns] = 0.0

    def compact(self, places: Tensor, units: int) -> None:
        """Hold only the units at these places, of so many."""
        others = torch.arange(units * self.width, len(self.inverse), device=places.device)
        columns = places[:, None] * self.width + torch.arange(self.width, device=places.device)
        kept = torch.cat((columns.flatten(), others))
        self.weight, self.inverse = self.weight[:, kept], self.inverse[kept][:, kept]


def _leave_one_by_one(readers: Sequence[_Reader], units: int) -> Tensor:
    errors = torch.zeros(units, dtype=torch.float64)
    held = torch.arange(units, device=readers[0].inverse.device)
    gone = torch.zeros(units, dtype=torch.bool, device=held.device)
    while len(held):
        each = [reader.errors(len(held)) for reader in readers]
        total = torch.stack([found for found, _ in each]).sum(0).masked_fill(gone, torch.inf)
        best = int(total.argmin())
        errors[held[best]] = float(total[best].clamp_min(0.0))
        gone[best] = True
        for reader, (_, blocks) in zip(readers, each, strict=True):
            reader.remove(best, blocks[best])
        if gone.sum() >= _EMPTY * len(held):  # computing with what has left takes longer than leaving it out
            places = (~gone).nonzero().flatten()
            for reader in readers:
                reader.compact(places, len(held))
            held, gone = held[places], gone[places]
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
