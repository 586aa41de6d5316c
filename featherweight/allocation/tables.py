"""Damage and cost tables of a network, from one pass over calibration data and one look at every weight.

Damage is half the curvature times the square of the error, summed over a weight: to second order, the divergence of the
network's output in nats, with no label read. That holds for rounding, whose errors are independent; those of zeros, ranks and
channels all point one way, so a few of each are tried on the network, and the others follow the ratio of true to predicted.
Bytes are the entropy of the codes, about what the file's coder spends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.allocation.treatments import Group, Row, Tables, Treatment
from featherweight.allocation.truth import Reference
from featherweight.costs import count_macs, parameters
from featherweight.data import batches, example_inputs, forward, samples
from featherweight.edits import module_at, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.layers.attention import MultiHeadAttention
from featherweight.layers.bags import EmbeddingBag
from featherweight.layers.cells import RecurrentCell
from featherweight.layers.quantized import limit
from featherweight.masking import masked
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.cuts import clusters, keep_edit
from featherweight.techniques.factorizations import Metric, matrix_factors
from featherweight.techniques.importance import indices, makers, sums
from featherweight.techniques.matrices import matrices
from featherweight.techniques.round_parameters import unrounded
from featherweight.techniques.rounding import grid_scale
from featherweight.techniques.scores import largest
from featherweight.techniques.sensitivity import curvatures
from featherweight.techniques.unit_costs import uses

BITS = (2, 3, 4, 5, 6, 8)
DENSITIES = (1.0, 0.6, 0.4, 0.25, 0.16, 0.1, 0.06, 0.04, 0.025)
RANKS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1)  # shares of the rank at which two factors are as large as the matrix
RANK_BITS = (3, 4, 5, 6, 8)
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2)
FINE = tuple(round(1 - 0.05 * step, 2) for step in range(18))
"""Shares of a network of few groups, where a step of one group is a leap of the file."""
EIGHTHS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares for speed: of widths such as 64 they leave whole blocks of 8 and 16 channels, which kernels work on."""
_FEW = 4  # groups
_TRIED = 3  # of the densities, ranks and shares each
_LEAST_RANKED = 2  # ranks below which factoring a layer is not tried
_SCALE_BYTES = 2.0
_ENOUGH = 2048  # values that a step is chosen by
_MOST_MACS = 1e12  # of all true evaluations together
_FEWEST, _MOST = 32, 2048  # samples of each of them
_RUIN = 1e3  # times the worst that can be told in nats, where outputs are no numbers any more
_FACTORED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SPLIT = (MultiHeadAttention, RecurrentCell, EmbeddingBag)  # what `split_layers` makes

Family = list[tuple[float, float, Tensor]]
"""Of one weight, for each strength from mild to strong: the strength, predicted nats and the weight, `[out, rest]`."""


def measure_tables(
    model: nn.Module, context: Context, count: int = 16, shares: tuple[float, ...] | None = None
) -> Tables:
    """Return the tables of a model as it stands; batch norms should be folded first.

    Args:
        model: comes back as it was.
        context: calibration data, example, scope, seed and device.
        count: calibration batches to read for curvatures.
        shares: of each group's channels that may be kept, the largest first, 1 being the first; by the number of groups when None.

    Raises:
        DataError: there is no calibration data.
    """
    weights = {name: weight for name, weight in matrices(model, context).items() if isinstance(weight, nn.Parameter)}
    nats = _nats(model, weights, context, count)
    found = clusters(model, context)
    shares = shares or (FINE if len(found) <= _FEW else SHARES)
    used, macs = uses(model, context), macs_of_one(model, context)
    tried = _TRIED * (2 * len(weights) + len(found))
    most = round(min(_MOST, max(_FEWEST, _MOST_MACS / max(1.0, macs * tried))))
    reference = Reference(model, context, most)
    rows = []
    for place, (name, weight) in enumerate(weights.items()):
        context.report(f"damage and cost of {name}", place / (len(weights) + len(found)))
        table = _Weight(model, name, weight, nats.get(name), used.get(id(weight), 1.0), reference)
        out, inside = (cluster_of(found, name, dim) for dim in (0, 1))
        rows.append(Row(name, table.path, tuple(weight.shape), out, inside, table.treatments()))
    groups = []
    for place, cluster in enumerate(found):
        made = set().union(*(makers(model, group) for group in cluster))
        names = tuple(path for path, _ in model.named_modules() if path in made)
        context.report(f"damage of {names[0]}'s channels", (len(weights) + place) / (len(weights) + len(found)))
        units = min(map(len, cluster))
        groups.append(Group(names, units, shares, _removal(model, cluster, nats, reference, shares)))
    plain = [row.treatments[0] for row in rows]
    fixed = {
        "size": 0.0,
        "params": float(parameters(model)[0] - sum(one.params for one in plain)),
        "macs": max(0.0, macs - sum(one.macs for one in plain)),
    }
    split = any(isinstance(layer, _SPLIT) for layer in model.modules())
    return Tables(tuple(rows), tuple(groups), fixed, split, bool(loose_parameters(model, context)))


def loose_parameters(model: nn.Module, context: Context) -> list[str]:
    """Return the names of the parameters with two dimensions or more that are in no row."""
    weights = matrices(model, context)
    return [name for name, _ in unrounded(model) if name not in weights]


def _nats(model: nn.Module, weights: Mapping[str, nn.Parameter], context: Context, count: int) -> dict[str, Tensor]:
    """Half the second derivative of the divergence by each weight, `[out, rest]`, a mean over samples."""
    read = sum(samples(inputs) for inputs, _ in islice(batches(context.data.calibrate, "calibrate"), count))
    return {name: found / (2 * read) for name, found in curvatures(model, weights, context, count).items()}


def macs_of_one(model: nn.Module, context: Context) -> float:
    """Return the multiply-adds of one sample."""
    inputs = example_inputs(context.data, context.device)
    with evaluating(model):
        return count_macs(lambda: forward(model, inputs)).macs / samples(inputs)


def cluster_of(found: Sequence[Sequence[CoupledGroup]], name: str, dim: int) -> int:
    """Return which cluster a dimension of a weight belongs to, that of most units where there are several, or -1."""
    holding = {
        place: len(group) for place, cluster in enumerate(found) for group in cluster if (name, dim) in group.members
    }
    return max(holding, key=lambda place: holding[place], default=-1)


class _Weight:
    """One weight: every way to store it, predicted, and some of them tried."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weight: Tensor,
        nats: Tensor | None,
        used: float,
        reference: Reference,
    ) -> None:
        self.model, self.name, self.path, self.reference = model, name, name.rpartition(".")[0], reference
        self.shape, self.like, self.used = weight.shape, weight, used
        self.matrix = weight.detach().cpu().double().flatten(1)
        self.nats = torch.zeros_like(self.matrix) if nats is None else nats

    def treatments(self) -> tuple[Treatment, ...]:
        """Return all of them, unordered but for the first, which changes least."""
        found = []
        for (density, lost, pruned), damage in self._corrected(self._pruned()):
            for bits in BITS:
                rounded, size = _rounded(pruned, bits)
                more = self._predicted(rounded) - lost
                found.append(self._treatment(bits, density, 0, damage, more, size, self.matrix.numel()))
        found.sort(key=lambda one: (-one.density, -one.bits))
        layer = module_at(self.model, self.path)
        if isinstance(layer, _FACTORED) and getattr(layer, "groups", 1) == 1 and self.name.endswith("weight"):
            factors = self._factors()
            family = [
                (float(outer.shape[1]), self._predicted(outer @ inner), outer @ inner) for outer, inner in factors
            ]
            for (outer, inner), ((rank, lost, _), damage) in zip(factors, self._corrected(family), strict=True):
                for bits in RANK_BITS:
                    (left, size), (right, more) = _rounded(outer, bits), _rounded(inner, bits)
                    further, params = self._predicted(left @ right) - lost, outer.numel() + inner.numel()
                    found.append(self._treatment(bits, 1.0, int(rank), damage, further, size + more, params))
        return tuple(found)

    def _treatment(
        self, bits: int, density: float, rank: int, removal: float, rounding: float, size: float, params: int
    ) -> Treatment:
        return Treatment(bits, density, rank, removal, max(0.0, rounding), size, float(params), params * self.used)

    def _predicted(self, value: Tensor) -> float:
        return float((self.nats * (value - self.matrix).square()).sum())

    def _pruned(self) -> Family:
        family = []
        for density in DENSITIES:
            if density * self.matrix.numel() >= 1:
                value = torch.where(largest(self.matrix.abs(), 1 - density), self.matrix, 0.0)
                family.append((density, self._predicted(value), value))
        return family

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Two factors at each rank, weighed by rows and columns of the curvature."""
        out, inside = self.matrix.shape
        even, mean = out * inside / (out + inside), self.nats.mean().clamp_min(1e-300)
        columns, rows = self.nats.mean(0) / mean, self.nats.mean(1) / mean
        metric = Metric(torch.diag(columns.clamp_min(1e-6)), None, rows.clamp_min(1e-6).sqrt())
        ranks = sorted({round(share * even) for share in RANKS}, reverse=True)
        return [matrix_factors(self.matrix, metric, rank) for rank in ranks if rank >= _LEAST_RANKED]

    def _corrected(self, family: Family) -> Iterator[tuple[tuple[float, float, Tensor], float]]:
        """Every strength with its damage: predicted, times the ratio of true to predicted of those tried around it."""
        predicted = [lost for _, lost, _ in family]
        true = [
            self.reference.changed(self.model, {self.name: value.reshape(self.shape).to(self.like)})
            for _, _, value in (family[at] for at in _spaced(len(family)))
        ]
        damages = corrected(predicted, dict(zip(_spaced(len(family)), true, strict=True)))
        yield from zip(family, damages, strict=True)


def corrected(predicted: Sequence[float], true: Mapping[int, float]) -> list[float]:
    """Return predictions times the ratio of true to predicted, between those known in proportion on logarithmic scales.

    Args:
        predicted: by strength, from mild to strong, at least 0 and never falling.
        true: what some of them are, by place; what is infinite counts as far more than all others.
    """
    known = [at for at in sorted(true) if predicted[at] > 0]
    if not known:
        return list(predicted)
    ruin = _RUIN * max([1.0, *filter(math.isfinite, true.values())])
    places = [math.log(predicted[at]) for at in known]
    # differences of logarithms: of what the outputs hardly feel, a ratio would be no number any more
    ratios = [math.log(min(max(true[at], 1e-12), ruin)) - math.log(predicted[at]) for at in known]
    return [
        math.exp(math.log(value) + float(np.interp(math.log(value), places, ratios))) if value > 0 else 0.0
        for value in predicted
    ]


def _spaced(count: int) -> list[int]:
    """Places of those that are tried, from the second mildest to the second strongest; none of none."""
    if not count:
        return []
    return sorted(set(np.linspace(min(1, count - 1), max(0, count - 2), _TRIED).round().astype(int).tolist()))


def _rounded(matrix: Tensor, bits: int) -> tuple[Tensor, float]:
    """The matrix on the grid of least squared error, and about how many bytes its codes take."""
    step, high = float(grid_scale(_some(matrix), bits, per_channel=False)), limit(bits)
    codes = (matrix / step).round().clamp(-high, high)
    counts = torch.bincount((codes + high).flatten().long()).double()
    shares = (counts / counts.sum()).clamp_min(1e-300)
    return codes * step, float(-(counts * shares.log2()).sum()) / 8 + _SCALE_BYTES


def _some(matrix: Tensor) -> Tensor:
    """Magnitudes evenly apart in their order, the largest among them: enough to choose a step by."""
    if matrix.numel() <= _ENOUGH:
        return matrix.reshape(1, -1)
    ordered = matrix.abs().flatten().sort(descending=True).values
    return ordered[torch.linspace(0, len(ordered) - 1, _ENOUGH).long()].reshape(1, -1)


def _removal(
    model: nn.Module,
    cluster: Sequence[CoupledGroup],
    nats: Mapping[str, Tensor],
    reference: Reference,
    shares: Sequence[float],
) -> tuple[float, ...]:
    """Nats at each share kept."""
    worths = [_unit_worths(group, nats, named_tensors(model)) for group in cluster]
    orders = [worth.argsort(descending=True, stable=True) for worth in worths]
    counts = [[max(1, round(share * len(group))) for group in cluster] for share in shares]
    predicted = [
        sum(float(worth[order[kept:]].sum()) for worth, order, kept in zip(worths, orders, each, strict=True))
        for each in counts
    ]
    true = {}
    for at in _spaced(len(shares)):
        parts = zip(cluster, orders, counts[at], strict=True)
        keep, _ = keep_edit(model, [(group, set(order[:kept].tolist())) for group, order, kept in parts], {})
        with masked(model, keep):
            true[at] = reference.divergence(model)
    return tuple(corrected(predicted, true))


def _unit_worths(group: CoupledGroup, nats: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Nats of each unit alone: what those who read it would lose, or where none is known, those who make it."""
    sides = {True: torch.zeros(len(group), dtype=torch.float64), False: torch.zeros(len(group), dtype=torch.float64)}
    for (name, dim), owned in zip(group.members, indices(group), strict=True):
        if name in nats:
            weight = tensors[name].detach().cpu().double()
            lost = (nats[name] * weight.flatten(1).square()).reshape(weight.shape)
            sides[dim == 0] += sums(lost, dim)[owned].sum(1)
    return sides[False] if bool(sides[False].any()) else sides[True]
