"""How likely each place of a matrix is to be filled, from what was read before it in its column, row and surroundings.

Pruned weights are rarely spread evenly: whole inputs and units die. Several log-odds are mixed linearly, as in context
mixing (Mahoney 2005, "Adaptive weighing of context models"), but with weights fitted by the encoder and sent.
"""

from __future__ import annotations

import numpy as np

from featherweight.coding.fixed import ONE, UNIT, Floats, Integers, chunk_starts, logarithm

INPUTS = 5
"""Inputs of the mix: constant, column, columns around, row so far, an earlier row."""

MIX_UNIT = 32
"""A weight of one in the mix, in steps."""

USUAL_MIX: Integers = np.array([0, 28, 6, 28, 0])
"""The mix where none is sent."""

_COLUMN_PRIOR = 2  # rows that the overall share counts for in a column's rate
_ROW_PRIOR = ONE  # filled places that the expectation counts for in a row's rate
_AROUND = 5  # columns averaged over, the column itself in the middle


class Density:
    """Log-odds of each place being filled, row by row.

    Args:
        rows: rows of the matrix, at least 1.
        columns: columns of the matrix, at least 1.
        filled: filled places in the whole matrix, in [0, rows × columns].
        lag: the row that many rows back serves as an example, at least 1.
    """

    def __init__(self, rows: int, columns: int, filled: int, lag: int) -> None:
        self.starts = np.array(chunk_starts(columns))
        self._share = min(max(1, ONE * filled // (rows * columns)), ONE - 1)
        odds = logarithm(np.array([self._share, ONE - self._share]))
        self.overall = int(odds[0] - odds[1])
        self._lag = lag
        self._row = 0
        self._counts = np.zeros(columns, np.int64)
        self._width = np.convolve(np.ones(columns, np.int64), np.ones(_AROUND, np.int64), "same")[:columns]
        if columns < _AROUND:
            self._width = np.full(columns, columns)
        self._tilts: list[int] = []
        self._expected = np.zeros(columns + 1, np.int64)

    def row_inputs(self) -> Integers:
        """Return what is known before the next row is read, `[INPUTS, columns]`; the row so far is still zero."""
        inputs = np.zeros((INPUTS, len(self._counts)), np.int64)
        inputs[0] = UNIT
        inputs[1], rates = self._odds(self._counts, np.full(len(self._counts), self._row), _COLUMN_PRIOR)
        inputs[2], _ = self._odds(self._around(), self._row * self._width, _COLUMN_PRIOR)
        np.cumsum(rates, out=self._expected[1:])
        if self._row >= self._lag:
            inputs[4] = self._tilts[self._row - self._lag]
        return inputs

    def tilts(self, filled: Integers) -> Integers:
        """Return the log-ratio of found to expected in the row so far, `[chunks]`.

        Args:
            filled: filled places of this row before each chunk, `[chunks]`.
        """
        expected = self._expected[self.starts]
        return logarithm(filled * ONE + _ROW_PRIOR) - logarithm(expected + _ROW_PRIOR)

    def tilt(self, filled: int, start: int) -> int:
        """Return the same for one chunk that begins at column `start`, with `filled` places filled before it."""
        ratio = logarithm(np.array([filled * ONE + _ROW_PRIOR, int(self._expected[start]) + _ROW_PRIOR]))
        return int(ratio[0] - ratio[1])

    def end_row(self, flags: Integers) -> None:
        """Learn the row just read, `[columns]` of zeros and ones."""
        self._tilts.append(self.tilt(int(flags.sum()), len(flags)))
        self._counts += flags
        self._row += 1

    def _around(self) -> Integers:
        if len(self._counts) < _AROUND:
            return np.full(len(self._counts), self._counts.sum())
        return np.convolve(self._counts, np.ones(_AROUND, np.int64), "same")

    def _odds(self, ones: Integers, seen: Integers, prior: int) -> tuple[Integers, Integers]:
        """Return log-odds over the overall ones, `[columns]`, and the rate in steps of 1 / `ONE`, `[columns]`."""
        full = ones * ONE + prior * self._share
        total = (seen + prior) * ONE
        return logarithm(full) - logarithm(total - full) - self.overall, full // (seen + prior)


def fit_mix(inputs: Integers, flags: Integers, overall: int) -> tuple[Integers, float]:
    """Fit the mix by logistic regression (Newton steps), rounded to what can be sent.

    Args:
        inputs: `[INPUTS, places]` in steps of 1 / `UNIT`.
        flags: zeros and ones, `[places]`.
        overall: log-odds of the overall share, in steps of 1 / `UNIT`.

    Returns:
        The mix, `[INPUTS]`, each in [-128, 127] steps of 1 / `MIX_UNIT`, and the bits that the flags then take.
    """
    table = inputs.astype(np.float64) / UNIT
    offset, weights = overall / UNIT, USUAL_MIX / MIX_UNIT
    for _ in range(6):
        likely = _curve(offset + weights @ table)
        slope = table @ (flags - likely) - 0.1 * weights
        bend = (table * (likely * (1 - likely))) @ table.T + 0.1 * np.eye(INPUTS)
        weights = weights + np.clip(np.linalg.solve(bend, slope), -1, 1)
    mix = np.clip(np.rint(weights * MIX_UNIT), -128, 127).astype(np.int64)
    return mix, mix_bits(inputs, flags, overall, mix)


def mix_bits(inputs: Integers, flags: Integers, overall: int, mix: Integers) -> float:
    """Return the bits that the flags, `[places]`, take under this mix, `[INPUTS]`."""
    likely = _curve(overall / UNIT + (mix / MIX_UNIT) @ (inputs / UNIT)).clip(1e-6, 1 - 1e-6)
    return float(-np.log2(np.where(flags > 0, likely, 1 - likely)).sum())


def _curve(log_odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-log_odds.clip(-13, 13))))
