"""One pass over a matrix of weights that picks integers which are near, and cheap for the coder of `scan.py`.

A code costs what adaptive counts say under an expected magnitude, which follows from column, row and left neighbours as the
coder's does. Where errors are compensated, that of each code is moved to the later columns of its row (GPTQ). As in
`scan.py`, the same source runs compiled and as plain Python, to the same bits.

Rate-distortion optimized quantization: Wiedemann et al., "DeepCABAC", 2019; inside GPTQ: Conzelmann & Bamler, CERWU, 2025.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.coding.machine import run

Floats = NDArray[np.float64]
Codes = NDArray[np.int32]

_CELLS = 37  # of magnitudes: 24 alone, then eight to a cell
_ALONE = 24
_ROW = _CELLS + 1  # the counts of a context, and their sum
_CLASSES = 32  # contexts by expected magnitude, half an octave each
_LEVELS = 1 << 16  # entries of the table from expected magnitude, in 1/1024, to context
_STRENGTH = 12  # seen codes that the first counts of a context count for
_STEP = 16
_MOST = 1 << 15  # of a context's total
_PRIOR = 4  # rows that the overall mean counts for in a column's


def choose(
    codes: Any,
    errors: Any,
    counts: Any,
    sums: Any,
    values: Any,
    worths: Any,
    factor: Any,
    compensate: bool,
    reach: tuple[int, int, int],
    rate: float,
    mean: float,
    highest: int,
    classes: Any,
    bits: Any,
    columns: Any,
) -> None:
    """Fill `codes` from its column `reach[2]` on, row after row.

    Args:
        codes: `[rows, reach[2] + width]`, the columns before the first one filled already.
        errors: `[rows, width]`; filled with what is to be moved to the columns behind, where errors are compensated.
        counts: `[contexts * (cells + 1)]`, those of the cells and then their sum; they learn.
        sums: magnitudes of each row so far, and what was expected of them, `[rows, 2]`; they go on.
        values: weights over the step, `[rows, width]`; compensated ones are changed.
        worths: what the square of an error of one step costs, `[rows, width]`; negative where the code must be zero.
        factor: upper Cholesky factors of the inverse second moment of the inputs, `[groups, width, width]`.
        compensate: whether there is one.
        reach: how far to the left a code's three neighbours are, the last the farthest.
        rate: what a bit costs.
        mean: mean magnitude that is expected overall.
        highest: largest magnitude of a code.
        classes: context of each expected magnitude, in 1/1024, `[levels]`.
        bits: logarithms to base two of all whole numbers to the largest sum of counts, `[sums]`.
        columns: zeros, `[width]`.
    """
    rows, width, margin = len(values), len(columns), reach[2]
    group_rows = rows // len(factor)
    for number in range(rows):
        own, inner = codes[number], factor[number // group_rows]
        share = 1.0 / (number + _PRIOR)
        magnitude, expected, ratio = sums[number][0], sums[number][1], 1.0
        for column in range(width):
            if column & 15 == 0:
                ratio = (magnitude + 8 * mean) / (expected + 8 * mean)
            level = (columns[column] + _PRIOR * mean) * share
            place = margin + column
            near, next_near, far = abs(own[place - reach[0]]), abs(own[place - reach[1]]), abs(own[place - margin])
            guess = (4 * mean + 18 * level + 28 * level * ratio + 5 * near + 3 * next_near + 2 * far) * 16.0
            base = classes[min(int(guess), _LEVELS - 1)] * _ROW
            value, worth = values[number][column], worths[number][column]
            size = abs(value)
            nearest = int(min(size + 0.5, highest))
            best = 0
            if worth >= 0.0 and nearest > 0:
                # the sum of counts is in each cost, and decides nothing
                least = worth * size * size - rate * bits[counts[base]]
                for wanted in range(max(1, nearest - 1), nearest + 1):
                    cell, below = wanted, 0
                    if wanted >= _ALONE:
                        cell, below = _ALONE + ((wanted - _ALONE) >> 3), 3
                    cost = worth * (size - wanted) * (size - wanted) + rate * (1 + below - bits[counts[base + cell]])
                    if cost < least:
                        least, best = cost, wanted
            cell = best if best < _ALONE else _ALONE + ((best - _ALONE) >> 3)
            counts[base + cell] += _STEP
            counts[base + _CELLS] += _STEP
            if counts[base + _CELLS] >= _MOST:
                total = 0
                for other in range(base, base + _CELLS):
                    counts[other] = (counts[other] + 1) >> 1
                    total += counts[other]
                counts[base + _CELLS] = total
            code = best if value >= 0.0 else -best
            own[place] = code
            magnitude += best
            expected += level
            columns[column] += best
            if compensate:
                lost = (value - code) / inner[column][column]
                errors[number][column] = lost
                for later in range(column + 1, width):
                    values[number][later] -= lost * inner[column][later]
        sums[number][0], sums[number][1] = magnitude, expected


class Chooser:
    """Picks the codes of one matrix, `[rows, columns]`, block of columns after block.

    Args:
        mean: expected mean magnitude of the codes, above 0.
        rows: of the matrix.
        side: columns of a kernel; 1 where there is none.
        rate: what a bit costs, in the unit of the worths.
        highest: largest magnitude of a code, 1 to 127.
        fast: compiled or in plain Python; None chooses.
    """

    def __init__(self, mean: float, rows: int, side: int, rate: float, highest: int, fast: bool | None = None) -> None:
        self._reach = (1, side, side + 1) if side > 1 else (1, 2, 3)
        self._before = np.zeros((rows, self._reach[2]), np.int32)
        self._counts = _first_counts()
        self._sums = np.zeros((rows, 2))
        self._settings = (self._reach, float(rate), float(mean), highest)
        self._fast = fast

    def block(self, values: Floats, worths: Floats, factor: Floats | None = None) -> tuple[Codes, Floats]:
        """Return the codes of the next columns, and the errors to be moved behind them, `[rows, width]` both.

        Args:
            values: weights over the step, `[rows, width]`.
            worths: what the square of an error of one step costs, `[rows, width]`; negative where the code must be zero.
            factor: upper Cholesky factors of the inverse second moment of these inputs, `[groups, width, width]`; errors are
                compensated within the block, and are zero without it.
        """
        margin = self._reach[2]
        codes = np.concatenate([self._before, np.zeros(values.shape, np.int32)], 1)
        errors = np.zeros(values.shape)
        inner = np.ones((1, 1, 1)) if factor is None else np.ascontiguousarray(factor)
        arguments = (
            codes,
            errors,
            self._counts,
            self._sums,
            np.array(values, np.float64),
            np.ascontiguousarray(worths),
            inner,
            factor is not None,
            *self._settings,
            *_tables(),
            np.zeros(values.shape[1]),
        )
        run(choose, (), 4, arguments, self._fast)
        self._before = codes[:, -margin:].copy()
        return codes[:, margin:], errors


@cache
def _tables() -> tuple[NDArray[np.int64], Floats]:
    """Return the context of each expected magnitude, and the logarithms of counts."""
    levels = np.maximum(np.arange(_LEVELS), 1) / 1024
    classes = np.rint(2 * np.log2(levels)).astype(np.int64) + _CLASSES - 12
    return classes.clip(0, _CLASSES - 1), np.log2(np.maximum(np.arange(_MOST + 2 * _STEP), 1))


def _first_counts() -> NDArray[np.int64]:
    """Return counts as of geometric distributions with the mean of each context, `[contexts * (cells + 1)]`."""
    means = 2.0 ** ((np.arange(_CLASSES) - _CLASSES + 12) / 2)
    edges = np.concatenate([np.arange(_ALONE), _ALONE + 8 * np.arange(_CELLS - _ALONE + 1)])
    tails = (means / (1 + means))[:, None] ** edges
    counts = np.rint(1 + _STRENGTH * _STEP * (tails[:, :-1] - tails[:, 1:])).astype(np.int64)
    return np.concatenate([counts, counts.sum(1, keepdims=True)], 1).reshape(-1)
