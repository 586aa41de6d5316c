"""Plans for integer matrices whose values follow from their neighbours: least-squares fits of the encoder to a sample of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.coding.fixed import Floats, Integers
from featherweight.coding.neighbours import FINEST, LONGEST_PERIOD, Plan, reach, usual_slopes, usual_weights
from featherweight.coding.scan import PRIOR

_SAMPLE = 60_000  # places that the fits look at
_SPARSE = 0.4  # share of zeros from which on telling them apart is tried
_ALWAYS_SPARSE = 0.8


def plans(places: NDArray[np.integer], size: int, usual: int, period: int, thorough: bool) -> Iterator[Plan]:
    """Yield the plans that are worth a try, likeliest last.

    Args:
        places: values in [0, size), `[rows, columns]`, both at least 1, not all alike.
        size: of the alphabet, 2 to 256.
        usual: the place of zero, or the nearest.
        period: columns after which a place has the same meaning again: those of a convolution's kernel, or 1.
        thorough: try more of them.
    """
    zeros = float((places == usual).mean())
    for apart in (False, True):
        if (apart and zeros < _SPARSE) or (not apart and zeros > _ALWAYS_SPARSE):
            continue
        centre = usual if apart or (zeros > 0 and 0 < usual < size - 1) else int(np.median(places))
        yield from _fitted(_Sample(places, centre, apart, period), size, thorough)


class _Sample:
    """Rows of a matrix with what is known before each place, for least-squares fits."""

    def __init__(self, places: NDArray[np.integer], centre: int, apart: bool, period: int) -> None:
        rows, columns = places.shape
        self.apart, self.centre, self.total = apart, centre, places.size
        chosen = np.unique(np.linspace(0, rows - 1, max(8, min(rows, _SAMPLE // columns))).astype(int))
        values = places.astype(np.int16) - np.int16(centre)
        sizes = (values != 0) if apart else np.abs(values)
        self.mean = max(float(sizes.mean()), 2.0**-FINEST)
        own, own_sizes = values[chosen].astype(np.float64), sizes[chosen].astype(np.float64)
        before, sizes_before = _sums_before(values, chosen), _sums_before(sizes, chosen)
        share = 1 / (chosen[:, None] + PRIOR)
        steps = np.arange(columns)[None] // 16 * 16  # means of a row are brought up to date every 16 columns
        drift, level = before * share, (sizes_before + PRIOR * self.mean) * share
        row_drift = _row_sums(own, steps) / (steps + 8)
        expected = _row_sums(level, steps)
        ratio = (_row_sums(own_sizes, steps) + 8 * self.mean) / (expected + 8 * self.mean)
        self.period = period if columns % period == 0 and period <= LONGEST_PERIOD else 1
        self.side = max(1, round(self.period**0.5))
        shifted = [_shifted(own, distance) for distance in reach(self.side)]
        self.values = own.reshape(-1)
        self.used = self.values != 0 if apart else np.ones(own.size, bool)
        self.known = np.stack([*shifted, drift, row_drift], -1).reshape(own.size, -1)
        near = [(one != 0) if apart else np.abs(one) for one in shifted[:3]]
        self.levels = np.stack([np.full_like(level, self.mean), level, level * ratio, *near], -1).reshape(own.size, -1)
        self.phases = np.tile(np.arange(columns) % self.period, len(own))

    def slopes(self, period: int) -> Integers:
        """Return the slopes that fit best, `[period, SLOPES]`."""
        phases = self.phases % period
        chosen = [self.used & (phases == phase) for phase in range(period)]
        return np.stack([_least_squares(self.known[here], self.values[here]) for here in chosen])

    def expected(self, slopes: Integers) -> Floats:
        """Return the expected values, `[places]`, under slopes, `[period, SLOPES]`."""
        table = slopes.astype(np.float64)[self.phases % len(slopes)] / 64
        return np.asarray(np.einsum("ij,ij->i", self.known, table))

    def gain(self, slopes: Integers) -> float:
        """Return about how many bytes the whole matrix gets shorter by these slopes, `[period, SLOPES]`."""
        if not self.used.any():
            return 0.0
        values, rest = self.values[self.used], (self.values - self.expected(slopes))[self.used]
        before, after = (float(np.square(part).sum()) + len(part) / 12 for part in (values, rest))
        return self.total * float(self.used.mean()) * 0.5 * float(np.log2(before / after)) / 8


def _fitted(sample: _Sample, size: int, thorough: bool) -> Iterator[Plan]:
    """Yield plans without and with weights of neighbours and of magnitudes."""
    mean = min(max(0, round(8 * float(np.log2(512 / sample.mean)))), 8 * FINEST)
    options = []
    for period in sorted({1, sample.period}):
        slopes = sample.slopes(period)
        options.append((sample.gain(slopes) - 0.7 * slopes.size - 3, slopes))
    usual = usual_slopes(sample.apart, sample.side)
    options.append((sample.gain(usual), usual))
    options.sort(key=lambda option: option[0])
    for _, slopes in options if thorough else options[-1:]:
        expected = sample.expected(slopes)
        rest = (sample.values != 0).astype(np.float64) if sample.apart else np.abs(sample.values - expected)
        for weights in (usual_weights(sample.apart), _least_squares(sample.levels, rest))[0 if thorough else 1 :]:
            if sample.apart:
                spread = round(16 * float(np.abs(sample.values[sample.used]).mean())) if sample.used.any() else 16
            else:
                guess = (sample.levels @ (weights / 64)).clip(0)
                ratio = max(float((guess if guess.any() else rest).mean()), 1e-4) / sample.mean
                spread = min(max(-128, round(8 * float(np.log2(ratio)))), 127)
            yield Plan(size, sample.centre, sample.apart, mean, spread, sample.side, slopes, weights)


def _least_squares(known: Any, wanted: Any) -> Integers:
    """Return weights, `[inputs]`, in whole 1/64 within int8, for `known`, `[places, inputs]`."""
    square = known.T @ known + (1e-3 * len(known) + 1e-6) * np.eye(known.shape[1])
    fit = np.linalg.solve(square, known.T @ wanted)
    return np.asarray(np.clip(np.rint(64 * fit), -127, 127), np.int64)


def _shifted(values: Any, distance: int) -> Any:
    moved = np.zeros_like(values)
    moved[:, distance:] = values[:, : max(0, values.shape[1] - distance)]
    return moved


def _row_sums(values: Any, steps: Any) -> Any:
    """Return the sum of each row before the column that `steps`, `[1, columns]`, names, `[rows, columns]`."""
    sums = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, 1)], 1)
    return sums[:, steps[0]]


def _sums_before(values: Any, chosen: Any) -> Any:
    """Return the sum of each column before each chosen row, `[chosen, columns]`; the first chosen is row 0."""
    blocks = np.add.reduceat(values, chosen, axis=0, dtype=np.int64)
    return np.cumsum(blocks, 0) - blocks
