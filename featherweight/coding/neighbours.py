"""Integer matrices whose values follow from their neighbours: what is sent before the first value, and the first counts.

A value is expected where a weighted sum of its neighbours says, and as far from there as another says; both sums put it
into a context, whose counts start as a bell (a logistic distribution) and learn. Weights are least-squares fits of the
encoder, sent in steps of 1/64; one set for each place in the kernel of a convolution, where that pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.coding.fixed import ONE, UNIT, Integers, logarithm, logistic
from featherweight.coding.machine import run
from featherweight.coding.priors import Prior
from featherweight.coding.ranges import Decoder, Encoder
from featherweight.coding.scan import (
    CELLS,
    FLAG_CLASSES,
    LEVELS,
    LONGEST_STEP,
    MEANS,
    OPENING,
    PAD,
    PARTS,
    SLOPES,
    SPREADS,
    STEP,
    scan,
)
from featherweight.coding.varint import Reader, framed, varint
from featherweight.errors import ArtifactError

LARGEST_ALPHABET = 256
"""Most values of an alphabet."""

MOST_COLUMNS = 1 << 22
"""Most columns, which take 40 bytes each."""

LONGEST_PERIOD = 32
"""Most sets of slopes."""

FINEST = 24
"""Most fractional bits of a magnitude."""

_APART, _KERNEL, _LINE, _CENTRE, _SLOPES, _WEIGHTS = 1, 2, 4, 8, 16, 32  # bits of the head
_USUAL_SIDE = 3
_EIGHTHS = (512, 558, 609, 664, 724, 790, 861, 939)  # an octave in eight steps
# what trained networks have in common, taken where nothing is sent: slopes in a kernel, weights of magnitudes
_USUAL_SLOPES = {False: (16, 16, -5, 4, 10), True: (36, 36, -12, 30, 60)}
_USUAL_WEIGHTS = {False: (4, 18, 28, 5, 3, 2), True: (13, 15, 20, 6, 4, 2)}
_STRENGTH = 14  # seen symbols that a bell counts for
_LOW_STRENGTH = 64
_FLAG_STRENGTH = 24
_MAGNITUDE_STRENGTH = 8
_SIGN_STRENGTH = 12
_SIGN_SLOPE = 4  # classes of expected values to a unit of log-odds
_SLOPE_SPREAD = Prior(255, 127, 127, shape=2, strength=6, scale=30)
_STEPS = np.triu(np.full((CELLS, CELLS), STEP, np.int32)).reshape(-1)  # what each symbol adds to the counts up to each


@dataclass(frozen=True)
class Plan:
    """What the reader is told before the first value.

    Args:
        size: values of the alphabet, 2 to 256.
        centre: the value that is taken for zero, in [0, size).
        apart: zeros are told first.
        mean: mean magnitude in eighths of octaves, in [0, 192], 0 for 512 and 8 for 256.
        spread: mean distance from what is expected, in eighths of octaves above `mean`, in [-128, 127]; where zeros are
            told first, mean magnitude of the others in sixteenths, at least 1.
        side: columns of a kernel, or after which a line repeats, in [1, 255].
        slopes: `[period, SLOPES]`, int8.
        weights: `[6]`, int8.
    """

    size: int
    centre: int
    apart: bool
    mean: int
    spread: int
    side: int
    slopes: Integers
    weights: Integers

    @property
    def fine(self) -> int:
        """Fractional bits of magnitudes."""
        return -(-self.mean // 8)

    @property
    def bits(self) -> int:
        """Bits below a cell."""
        most = max(self.centre, self.size - 1 - self.centre) if self.apart else self.size
        return max(0, (most - 1).bit_length() - 4)

    @property
    def shift(self) -> int:
        """From 1/64 of a value to classes of expected values: half a cell each, a quarter for few values."""
        return 6 + self.bits - (2 if self.size <= 5 else 1)

    def pack(self, usual: int) -> bytes:
        """Return the bytes that `unpack` reads."""
        slopes = not np.array_equal(self.slopes, usual_slopes(self.apart, self.side))
        weights = not np.array_equal(self.weights, usual_weights(self.apart))
        moved = self.centre != usual
        head = _APART * self.apart + _CENTRE * moved + _SLOPES * slopes + _WEIGHTS * weights
        head += _KERNEL * (self.side == _USUAL_SIDE) + _LINE * (self.side not in (1, _USUAL_SIDE))
        data = bytes([head, self.mean]) + (varint(self.spread - 1) if self.apart else bytes([self.spread + 128]))
        if moved:
            data += varint(self.centre)
        if head & _LINE:
            data += bytes([self.side])
        if slopes:
            encoder = Encoder()
            encoder.alike((self.slopes.reshape(-1) + 127).astype(np.int32), _SLOPE_SPREAD.weights().astype(np.float64))
            data += bytes([len(self.slopes)]) + framed(bytes(encoder))
        if weights:
            data += self.weights.astype(np.int8).tobytes()
        return data

    @staticmethod
    def unpack(reader: Reader, size: int, usual: int) -> Plan:
        """Read what `pack` wrote.

        Raises:
            ArtifactError: the bytes are no such plan.
        """
        head, mean = reader.byte(), reader.byte()
        if head >= 2 * _WEIGHTS or mean > 8 * FINEST:
            raise ArtifactError(f"{reader.what}: unknown plan {head}, {mean}")
        apart = bool(head & _APART)
        spread = 1 + reader.varint(16 * size) if apart else reader.byte() - 128
        centre = reader.varint(size - 1) if head & _CENTRE else usual
        side = reader.byte() if head & _LINE else _USUAL_SIDE if head & _KERNEL else 1
        if side == 0:
            raise ArtifactError(f"{reader.what}: a line of no columns")
        slopes, weights = usual_slopes(apart, side), usual_weights(apart)
        if head & _SLOPES:
            period = reader.byte()
            if not 1 <= period <= LONGEST_PERIOD:
                raise ArtifactError(f"{reader.what}: a period of {period}")
            table = Decoder(reader.framed()).alike(period * SLOPES, _SLOPE_SPREAD.weights().astype(np.float64))
            slopes = table.astype(np.int64).reshape(period, SLOPES) - 127
        if head & _WEIGHTS:
            weights = np.frombuffer(reader.take(6), np.int8).astype(np.int64)
        return Plan(size, centre, apart, mean, spread, side, slopes, weights)

    def arguments(self, symbols: Any, data: Any, size: int, writing: bool) -> tuple[Any, ...]:
        """Return the arguments of `scan`, the counts as they are before the first value."""
        rows, columns = symbols.shape
        shape = (rows, columns, size, self.centre, self.bits, self.shift, self.fine, _EIGHTHS[-self.mean % 8])
        if self.apart:
            magnitudes = max(self.centre, self.size - 1 - self.centre)
            edges = 16 * np.arange(((magnitudes - 1) >> self.bits) + 2)[None] * (1 << self.bits) + 8 - self.spread
            cells = np.tile(_bell(edges, max(1, self.spread // 4), _MAGNITUDE_STRENGTH), (FLAG_CLASSES >> 3, 1))
            lows = np.tile(_flat(1 << self.bits), (CELLS, 1))
        else:
            cells, lows = self._bells()
        return (
            symbols,
            data,
            writing,
            shape,
            self.apart,
            reach(self.side),
            self.slopes.reshape(-1),
            self.weights,
            self._classes(),
            cells.reshape(-1),
            lows.reshape(-1),
            _STEPS,
            _pairs((np.arange(FLAG_CLASSES) - FLAG_CLASSES + 7) * UNIT // 2, _FLAG_STRENGTH),
            _pairs((np.arange(MEANS) - MEANS // 2) * UNIT // _SIGN_SLOPE, _SIGN_STRENGTH),
            np.zeros(PAD + columns, np.int64),
            np.zeros((4, columns), np.int64),
        )

    def _classes(self) -> Integers:
        """Return the context of each expected magnitude, `[LEVELS]`."""
        levels = np.maximum(4 * np.arange(LEVELS) + 2, 1)
        if self.apart:
            one = min(1 << self.fine, 4 * LEVELS)
            odds = logarithm(np.minimum(levels, one - 1)) - logarithm(np.maximum(one - levels, 1))
            classes = (2 * odds + UNIT // 2) // UNIT + FLAG_CLASSES - 7
            return np.asarray(classes.clip(0, FLAG_CLASSES - 1))
        octave = int(logarithm(np.array([2]))[0])
        distance = logarithm(levels) - int(logarithm(np.array([self._distance()]))[0])
        return np.asarray(((3 * distance + octave // 2) // octave + SPREADS // 2).clip(0, SPREADS - 1))

    def _distance(self) -> int:
        """Return the mean distance from what is expected, in steps of 2**-fine, at least 1."""
        octaves, eighths = divmod(-self.mean % 8 + self.spread, 8)
        return max(1, _EIGHTHS[eighths] << 16 + octaves >> 16)

    def _bells(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return first counts of cells and of the bits below, `[SPREADS * MEANS, CELLS]` each."""
        width, step = 1 << self.bits, 1 << (self.shift - 2)  # of a cell, in values; of a class, in sixteenths
        sides = (np.arange(MEANS) - MEANS // 2)[None, :, None]
        octaves = np.array([40, 50, 64, 80, 101, 128, 161, 203, 256])[:, None, None]  # thirds of octaves, 101 is one
        # 0.72 times the mean distance is the scale of a logistic distribution; in sixteenths of a value
        scale = np.maximum(1, (self._distance() * octaves * 1826 // 16_000) >> self.fine)
        count = ((self.size - 1) >> self.bits) + 1
        edges = (16 * (np.arange(count + 1) * width - self.centre) - 8)[None, None]
        cells = _bell(edges - sides * step, scale, _STRENGTH)
        lows = np.zeros((1, CELLS), np.int32)
        if self.bits:
            edges = (16 * np.arange(width + 1) - 8)[None, None]
            lows = _bell(edges + sides * 8 * width, scale, _LOW_STRENGTH)
        return cells, lows


def usual_slopes(apart: bool, side: int) -> Integers:
    """Return the slopes, `[1, SLOPES]`, where none are sent: outside of a kernel nothing is known of neighbours."""
    return np.array([_USUAL_SLOPES[apart] if side > 1 else (0,) * SLOPES], np.int64)


def usual_weights(apart: bool) -> Integers:
    """Return the weights, `[6]`, where none are sent."""
    return np.array(_USUAL_WEIGHTS[apart], np.int64)


def reach(side: int) -> tuple[int, int, int]:
    """Return the distances of the neighbours: left, above and above to the left, where lines are `side` long."""
    return (1, side, side + 1) if side > 1 else (1, 2, 3)


def _bell(edges: Integers, scale: Integers | int, strength: int) -> NDArray[np.int32]:
    """Return cumulative counts, `[contexts, CELLS]`, of a logistic distribution between edges."""
    odds = (edges * UNIT) // scale
    heights = np.rint(logistic(odds) * ONE).astype(np.int64)
    shares = np.diff(heights)
    total = np.maximum(1, shares.sum(-1, keepdims=True))
    counts = 1 + shares * strength * STEP // total
    return _cumulative(counts.reshape(-1, counts.shape[-1]))


def _cumulative(counts: Integers) -> NDArray[np.int32]:
    """Return cumulative counts, `[contexts, CELLS]`, of counts `[contexts, symbols]`."""
    table = np.zeros((len(counts), CELLS), np.int64)
    table[:, : counts.shape[1]] = counts
    return np.cumsum(table, 1).astype(np.int32)


def _flat(symbols: int) -> NDArray[np.int32]:
    return _cumulative(np.full((1, symbols), max(1, STEP // 2)))


def _pairs(odds: Integers, strength: int) -> NDArray[np.int32]:
    """Return first counts of zeros and ones, `[2 * contexts]`, for log-odds of a one, `[contexts]`."""
    ones = np.rint(logistic(odds) * ONE).astype(np.int64)
    return (1 + np.stack([ONE - ones, ones], 1) * strength * STEP // ONE).astype(np.int32).reshape(-1)


def encode_neighbours(plan: Plan, places: NDArray[np.integer], usual: int, fast: bool | None = None) -> bytes:
    """Code values in [0, size), `[rows, columns]`, both at least 1.

    Args:
        plan: from `fits.plans`.
        places: the values.
        usual: the centre that a reader assumes when none is written.
        fast: compiled or in plain Python; None chooses.
    """
    symbols = (places - plan.centre).astype(np.int16)
    steps = 3 if plan.apart else 1
    data = np.zeros(LONGEST_STEP * (steps + (plan.bits > 0)) * symbols.size + 2 * OPENING, np.uint8)
    end = run(scan, PARTS, 2, plan.arguments(symbols, data, 0, True), fast)
    return plan.pack(usual) + data[:end].tobytes().rstrip(b"\0")


def decode_neighbours(
    reader: Reader, rows: int, columns: int, size: int, usual: int, fast: bool | None = None
) -> NDArray[np.int16]:
    """Read values in about [0, size), `[rows, columns]`, that `encode_neighbours` wrote.

    Raises:
        ArtifactError: the bytes are not such a stream.
    """
    plan = Plan.unpack(reader, size, usual)
    stream = reader.rest()
    symbols = np.zeros((rows, columns), np.int16)
    data = np.zeros(len(stream) + 2, np.uint8)
    data[: len(stream)] = np.frombuffer(stream, np.uint8)
    run(scan, PARTS, 2, plan.arguments(symbols, data, len(stream), False), fast)
    symbols += np.int16(plan.centre)
    return symbols
