"""Dense symbols of a matrix, each coded under the spread that its column and its row have shown so far.

Weights of one layer differ in scale by input and by unit; a place is put into one of `CLASSES` classes by its expected
magnitude, and every class keeps its own adaptive counts (context modelling as in CALIC, Wu & Memon 1997).
"""

from __future__ import annotations

import numpy as np

from featherweight.coding.fixed import UNIT, Floats, Integers, chunk_starts, logarithm
from featherweight.coding.priors import STEP, Prior, fit_prior
from featherweight.coding.ranges import Decoder, Encoder, Symbols
from featherweight.coding.varint import Reader, varint
from featherweight.errors import ArtifactError

CLASSES = 13
_CLASS_WIDTH = UNIT // 4
_FINE = 256  # steps to one symbol of magnitude
_COLUMN_PRIOR = 4  # rows that the overall mean counts for
_ROW_PRIOR = 8  # places that the expectation counts for
_SLICE = 8192  # places whose weights are in memory at a time
_STRENGTH = 12  # seen symbols that a class's first guess counts for


def encode_scaled(symbols: Symbols, size: int, usual: int) -> bytes:
    """Code symbols in [0, size), `[rows, columns]`, both at least 1; `usual` is the symbol expected in the centre."""
    prior = fit_prior(np.bincount(symbols.reshape(-1), minlength=size).astype(np.int64), usual)
    mean = max(1, round(_FINE * float(np.abs(symbols - prior.centre).mean())))
    state, encoder = _Scales(symbols.shape[1], prior, mean), Encoder()
    for row in symbols:
        magnitudes = np.abs(row.astype(np.int64) - prior.centre)
        sums = np.concatenate([[0], np.cumsum(magnitudes)])
        levels = state.column_levels()
        classes = [
            state.classes(levels[start:stop], int(sums[start]), start)
            for start, stop in zip(state.starts, state.stops, strict=True)
        ]
        chosen = np.concatenate(classes)
        for start in range(0, len(row), _SLICE):
            encoder.each(row[start : start + _SLICE], state.weights(chosen[start : start + _SLICE]))
        state.end_row(row, magnitudes, chosen)
    return prior.pack() + varint(mean) + bytes(encoder)


def decode_scaled(reader: Reader, rows: int, columns: int, size: int, usual: int) -> Symbols:
    """Read symbols in [0, size), `[rows, columns]`, that `encode_scaled` wrote.

    Raises:
        ArtifactError: the bytes are not such a stream.
    """
    prior = Prior.unpack(reader, size, usual)
    mean = reader.varint(_FINE * size)
    if mean == 0:
        raise ArtifactError(f"{reader.what}: a mean magnitude of zero")
    state, decoder = _Scales(columns, prior, mean), Decoder(reader.rest())
    symbols = np.empty((rows, columns), np.int32)
    for row in symbols:
        levels, total, chosen = state.column_levels(), 0, []
        for start, stop in zip(state.starts, state.stops, strict=True):
            chosen.append(state.classes(levels[start:stop], total, start))
            row[start:stop] = decoder.each(state.weights(chosen[-1]))
            total += int(np.abs(row[start:stop].astype(np.int64) - prior.centre).sum())
        state.end_row(row, np.abs(row.astype(np.int64) - prior.centre), np.concatenate(chosen))
    return symbols


class _Scales:
    """What encoder and decoder know alike: sums of magnitudes by column, counts of symbols by class."""

    def __init__(self, columns: int, prior: Prior, mean: int) -> None:
        self.starts = chunk_starts(columns)
        self.stops = [*self.starts[1:], columns]
        self._size, self._mean, self._rows = prior.size, mean, 0
        self._level = int(logarithm(np.array([mean]))[0])
        self._sums = np.zeros(columns, np.int64)
        self._expected = np.zeros(columns + 1, np.int64)
        shifts = (np.arange(CLASSES) - CLASSES // 2) * _CLASS_WIDTH / UNIT
        self._counts = np.stack([prior.weights(float(shift), _STRENGTH) for shift in shifts])

    def column_levels(self) -> Integers:
        """Return the log-ratio of each column's mean magnitude to the overall one, `[columns]`."""
        means = (self._sums * _FINE + _COLUMN_PRIOR * self._mean) // (self._rows + _COLUMN_PRIOR) + 1
        np.cumsum(means, out=self._expected[1:])
        return logarithm(means) - self._level

    def classes(self, levels: Integers, total: int, start: int) -> Integers:
        """Return the classes, `[places]`, of a chunk that begins at `start`, the row's magnitudes before it given."""
        prior = _ROW_PRIOR * self._mean
        ratio = logarithm(np.array([total * _FINE + prior, int(self._expected[start]) + prior]))
        places = (levels + (ratio[0] - ratio[1]) + _CLASS_WIDTH // 2) // _CLASS_WIDTH + CLASSES // 2
        return np.asarray(places.clip(0, CLASSES - 1))

    def weights(self, classes: Integers) -> Floats:
        """Return the weights of the symbols for each place, `[places, size]`."""
        return self._counts[classes].astype(np.float64)

    def end_row(self, row: Symbols, magnitudes: Integers, classes: Integers) -> None:
        """Learn the row just read: symbols, magnitudes and classes, each `[columns]`."""
        seen = np.bincount(classes * self._size + row, minlength=CLASSES * self._size)
        self._counts += STEP * seen.reshape(CLASSES, self._size)
        self._sums += magnitudes
        self._rows += 1
