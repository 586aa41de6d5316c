"""One pass over a matrix that writes or reads it: range coder, counts and contexts in whole numbers only.

The same source runs compiled and as plain Python, to the same bits; `machine.py` decides which. Rows of counts are
cumulative, 16 to a context, so that finding and learning a symbol are loops a compiler turns into a few instructions.

Range coding: Martin 1979, here with 32 bits, which is what processors divide quickly, and a carry; adaptive counts: Witten, Neal & Cleary
1987; prediction from neighbours: Wu & Memon 1997 (CALIC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CELLS = 16
"""Symbols of one row of counts."""

STEP = 16
"""What one seen symbol adds to its count."""

MEANS = 17
"""Contexts by expected value, the middle one for zero."""

SPREADS = 9
"""Contexts by expected magnitude."""

FLAG_CLASSES = 24
"""Contexts by expected share of values that are not zero."""

SLOPES = 5
"""Weights of an expected value: three neighbours', the column's mean, the row's mean."""

PAD = 256
"""Zeros in front of a row, as far as its neighbours reach."""

PRIOR = 4
"""Rows that the overall mean counts for in a column's."""

LEVELS = 4096
"""Entries of the table from expected magnitude to context."""

LONGEST_STEP = 3
"""Most bytes that one coded symbol takes."""

OPENING = 4
"""Bytes that the reader holds before the first symbol."""

_TOP, _LOW, _TAIL = 1 << 32, 1 << 24, (1 << 24) - 1
_MOST = 1 << 17  # of a row's total; the range is at least 128 times that


def narrow(
    data: Any, size: int, writing: bool, point: int, span: int, at: int, below: int, count: int
) -> tuple[int, int, int]:
    """Go on with the part of the range that starts `below` and is `count` wide, and move bytes out or in."""
    span = span * count
    if writing:
        point += below
        if point >= _TOP:
            point -= _TOP
            back = at - 1
            while data[back] == 255:
                data[back] = 0
                back -= 1
            data[back] += 1
    else:
        point = min(point - below, span - 1)  # it is smaller already, unless the bytes are damaged
    while span < _LOW:
        if writing:
            data[at] = point >> 24
            point = (point & _TAIL) << 8
        else:
            point = (point << 8) | (data[at] if at < size else 0)
        at += 1
        span = span << 8
    return point, span, at


def code_cell(
    counts: Any, row: int, symbol: int, steps: Any, data: Any, size: int, writing: bool, point: int, span: int, at: int
) -> tuple[int, int, int, int]:
    """Write `symbol`, or read one, under a row of cumulative counts, and count it."""
    base = max(row, 0) * CELLS  # a compiler that knows the sign needs no second look at any index
    total = counts[base + CELLS - 1]
    step = span // total
    if not writing:
        value = min(point // step, total - 1)
        symbol = 0
        for place in range(CELLS):
            symbol += counts[base + place] <= value
    upper = symbol * CELLS
    below = counts[base + symbol - 1] if symbol > 0 else 0
    count = counts[base + symbol] - below
    point, span, at = narrow(data, size, writing, point, step, at, step * below, count)
    for place in range(CELLS):
        counts[base + place] += steps[upper + place]
    if total >= _MOST:
        before = after = 0
        for place in range(base, base + CELLS):
            after += (counts[place] - before + 1) >> 1
            before = counts[place]
            counts[place] = after
    return symbol, point, span, at


def code_flag(
    counts: Any, row: int, flag: int, data: Any, size: int, writing: bool, point: int, span: int, at: int
) -> tuple[int, int, int, int]:
    """Write a zero or a one, or read it, under a pair of counts, and count it."""
    base = max(row, 0) * 2
    zeros, ones = counts[base], counts[base + 1]
    step = span // (zeros + ones)
    if not writing:
        flag = 1 if point >= step * zeros else 0
    if flag:
        point, span, at = narrow(data, size, writing, point, step, at, step * zeros, ones)
        counts[base + 1] = ones + STEP
    else:
        point, span, at = narrow(data, size, writing, point, step, at, 0, zeros)
        counts[base] = zeros + STEP
    if zeros + ones >= _MOST:
        counts[base], counts[base + 1] = (counts[base] + 1) >> 1, (counts[base + 1] + 1) >> 1
    return flag, point, span, at


def scan(
    symbols: Any,
    data: Any,
    writing: bool,
    shape: tuple[int, ...],
    apart: bool,
    reach: tuple[int, int, int],
    slopes: Any,
    weights: Any,
    classes: Any,
    cells: Any,
    lows: Any,
    steps: Any,
    flags: Any,
    signs: Any,
    line: Any,
    columns: Any,
) -> int:
    """Write a matrix to `data`, or read it from there.

    Args:
        symbols: `[rows, columns]`, values minus the one in the centre; filled when reading.
        data: bytes, long enough when writing; two zeros behind the last when reading.
        writing: which of the two.
        shape: rows, columns, bytes of `data`, place of the centre in the alphabet, bits below a cell, shift from
            1/64 of a value to the classes of expected values, fractional bits of magnitudes, and their mean.
        apart: zeros are told first, then sign and magnitude; otherwise a value is one symbol.
        reach: how far to the left a value's three neighbours are, each in [1, PAD].
        slopes: `SLOPES` weights in 1/64 for each phase, `[period * SLOPES]`.
        weights: weights of six magnitudes, `[6]`, in 1/64.
        classes: context of each expected magnitude, `[LEVELS]`.
        cells: cumulative counts, `[contexts * CELLS]`.
        lows: the same for the bits below a cell.
        steps: what each symbol adds to the cumulative counts, `[CELLS * CELLS]`.
        flags: counts of zeros and others in turn, `[FLAG_CLASSES * 2]`.
        signs: counts of negative and positive in turn, `[MEANS * 2]`.
        line: zeros, `[PAD + columns]`.
        columns: zeros, `[4, columns]`.

    Returns:
        The bytes written or read; the last few, up to `OPENING`, follow from what `finish` writes.
    """
    rows, width, size, centre, bits, shift, fine, mean = shape
    sums, sizes, drifts, levels = columns[0], columns[1], columns[2], columns[3]
    first, second, third = PAD - reach[0], PAD - reach[1], PAD - reach[2]
    period, mask = len(slopes), (1 << bits) - 1
    usual, plain, scaled, near, next_near, far = (
        weights[0] * mean,
        weights[1],
        weights[2],
        weights[3],
        weights[4],
        weights[5],
    )
    half = (1 << shift) >> 1
    point, span, at = 0, _TOP, 0
    if not writing:
        for at in range(OPENING):
            point = (point << 8) | (data[at] if at < size else 0)
        at = OPENING
    for number in range(rows):
        own = symbols[number]
        share = (1 << 20) // (number + PRIOR)
        for column in range(width):
            levels[column] = (((sizes[column] << fine) + PRIOR * mean) * share) >> 20
            drifts[column] = (sums[column] * 16 * share) >> 20
        total = magnitude = expected = phase = 0
        ratio = drift = 0
        for column in range(width):
            if column & 15 == 0:
                ratio = (((magnitude << fine) + 8 * mean) << 10) // (expected + 8 * mean)
                drift = total * 16 // (column + 8)
            level = levels[column]
            one, two, three = line[column + first], line[column + second], line[column + third]
            guess = slopes[phase] * one + slopes[phase + 1] * two + slopes[phase + 2] * three
            guess += (slopes[phase + 3] * drifts[column] + slopes[phase + 4] * drift) >> 4
            if apart:
                nearby = near * (one != 0) + next_near * (two != 0) + far * (three != 0)
            else:
                nearby = near * abs(one) + next_near * abs(two) + far * abs(three)
            size_guess = (usual + plain * level + scaled * ((level * ratio) >> 10) + (nearby << fine)) >> 8
            spread = classes[min(max(size_guess, 0), LEVELS - 1)]
            side = min(max(((guess + half) >> shift) + MEANS // 2, 0), MEANS - 1)
            value = own[column] if writing else 0
            if apart:
                filled, point, span, at = code_flag(
                    flags, spread, 1 if value != 0 else 0, data, size, writing, point, span, at
                )
                if filled:
                    positive, point, span, at = code_flag(
                        signs, side, 1 if value > 0 else 0, data, size, writing, point, span, at
                    )
                    rest = abs(value) - 1
                    cell, point, span, at = code_cell(
                        cells, 0, rest >> bits, steps, data, size, writing, point, span, at
                    )
                    low = 0
                    if bits:
                        low, point, span, at = code_cell(
                            lows, cell, rest & mask, steps, data, size, writing, point, span, at
                        )
                    value = (cell << bits) + low + 1
                    if not positive:
                        value = -value
                else:
                    value = 0
                magnitude += filled
            else:
                rest = value + centre
                cell, point, span, at = code_cell(
                    cells, spread * MEANS + side, rest >> bits, steps, data, size, writing, point, span, at
                )
                low = 0
                if bits:
                    apart_by = (cell << 1) - side + MEANS // 2 - (centre >> (bits - 1)) + MEANS // 2
                    low, point, span, at = code_cell(
                        lows,
                        spread * MEANS + min(max(apart_by, 0), MEANS - 1),
                        rest & mask,
                        steps,
                        data,
                        size,
                        writing,
                        point,
                        span,
                        at,
                    )
                value = (cell << bits) + low - centre
                magnitude += abs(value)
            own[column] = value
            line[PAD + column] = value
            total += value
            expected += level
            phase += SLOPES
            if phase == period:
                phase = 0
        for column in range(width):
            value = line[PAD + column]
            sums[column] += value
            sizes[column] += (1 if value != 0 else 0) if apart else abs(value)
    return finish(data, point, span, at) if writing else at


def finish(data: Any, point: int, span: int, at: int) -> int:
    """Write the value in `[point, point + span)` that ends in most zeros, and return where the bytes then end."""
    mask = _TOP - 1
    while ((point + mask) & ~mask) >= point + span:
        mask = mask >> 1
    point = (point + mask) & ~mask
    if point >= _TOP:
        point -= _TOP
        back = at - 1
        while data[back] == 255:
            data[back] = 0
            back -= 1
        data[back] += 1
    for place in range(OPENING):
        data[at + place] = (point >> (24 - 8 * place)) & 255
    return at + OPENING


PARTS: tuple[Callable[..., Any], ...] = (narrow, code_cell, code_flag, finish)
"""What `scan` calls, in order."""
