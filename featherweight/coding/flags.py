"""A matrix of zeros and ones as a range-coded stream, each place under its own probability.

Stream: filled places, head byte (1 = mix sent, 2 = empty rows told apart), what the head announces, the flags.
"""

from __future__ import annotations

import numpy as np

from featherweight.coding.adaptive import decode_adaptive, encode_adaptive
from featherweight.coding.density import INPUTS, MIX_UNIT, USUAL_MIX, Density, fit_mix, mix_bits
from featherweight.coding.fixed import Integers, logistic
from featherweight.coding.ranges import Decoder, Encoder, Symbols
from featherweight.coding.varint import Reader, framed, varint
from featherweight.errors import ArtifactError

_MIX, _EMPTY_ROWS = 1, 2
_FIT_PLACES = 120_000
_EMPTY_ROW_BITS = 4  # roughly what an empty row costs when it is not told apart


def encode_flags(flags: Symbols) -> bytes:
    """Code zeros and ones, `[rows, columns]`, both at least 1."""
    filled, head, side = int(flags.sum()), 0, b""
    alive = np.asarray(flags.any(axis=1))
    empty = len(flags) - int(alive.sum())
    if filled and _entropy_bits(empty, len(flags)) + 24 < _EMPTY_ROW_BITS * empty:
        head |= _EMPTY_ROWS
        side = framed(encode_adaptive(alive.astype(np.int32), 2, 1))
        flags = flags[alive]
    lag = _example_lag(flags.sum(1))
    mix, sent = _choose_mix(flags, filled, lag)
    if not sent:
        mix, lag = USUAL_MIX, 1
    else:
        head |= _MIX
        side += bytes([lag]) + mix.astype(np.int8).tobytes()
    density, encoder = Density(len(flags), flags.shape[1], filled, lag), Encoder()
    for row in flags:
        odds = density.overall + mix @ _known_inputs(density, row) // MIX_UNIT
        encoder.flags(row, logistic(odds))
        density.end_row(row.astype(np.int64))
    return varint(filled) + bytes([head]) + side + bytes(encoder)


def decode_flags(reader: Reader, rows: int, columns: int) -> Symbols:
    """Read zeros and ones, `[rows, columns]`, that `encode_flags` wrote.

    Raises:
        ArtifactError: the bytes are not such a stream.
    """
    filled, head = reader.varint(rows * columns), reader.byte()
    if head > _MIX + _EMPTY_ROWS:
        raise ArtifactError(f"{reader.what}: unknown head {head} of a matrix of flags")
    alive = np.ones(rows, bool)
    if head & _EMPTY_ROWS:
        alive = decode_adaptive(Reader(reader.framed(), reader.what), rows, 2, 1).astype(bool)
    lag, mix = 1, USUAL_MIX
    if head & _MIX:
        lag, mix = reader.byte(), np.frombuffer(reader.take(INPUTS), np.int8).astype(np.int64)
    flags = np.zeros((rows, columns), np.int32)
    if not alive.any():
        return flags
    density, decoder = Density(int(alive.sum()), columns, filled, max(1, lag)), Decoder(reader.rest())
    for row in np.flatnonzero(alive):
        _decode_row(density, decoder, mix, flags[row])
    return flags


def _decode_row(density: Density, decoder: Decoder, mix: Integers, row: Symbols) -> None:
    """Fill one row, `[columns]`, in place, chunk by chunk."""
    inputs = density.row_inputs()
    fixed, tilt_weight = mix @ inputs, int(mix[3])
    stops = [*density.starts[1:].tolist(), len(row)]
    start = filled = 0
    for stop in stops:
        tilt = density.tilt(filled, start)
        odds = density.overall + (fixed[start:stop] + tilt_weight * tilt) // MIX_UNIT
        row[start:stop] = decoder.flags(logistic(odds))
        filled += int(row[start:stop].sum())
        start = stop
    density.end_row(row.astype(np.int64))


def _known_inputs(density: Density, row: Symbols) -> Integers:
    """Return all inputs of a row that is known already, `[INPUTS, columns]`."""
    inputs = density.row_inputs()
    before = np.concatenate([[0], np.cumsum(row)])[density.starts]
    widths = np.diff(density.starts, append=len(row))
    inputs[3] = np.repeat(density.tilts(before), widths)
    return inputs


def _choose_mix(flags: Symbols, filled: int, lag: int) -> tuple[Integers, bool]:
    """Return the mix, `[INPUTS]`, and whether it pays to send it."""
    density, every = Density(len(flags), flags.shape[1], filled, lag), 1 + flags.size // _FIT_PLACES
    inputs, targets = [], []
    for number, row in enumerate(flags):
        if number % every == 0:
            inputs.append(_known_inputs(density, row))
            targets.append(row)
        else:
            density.row_inputs()
        density.end_row(row.astype(np.int64))
    table, wanted = np.concatenate(inputs, 1), np.concatenate(targets).astype(np.int64)
    mix, bits = fit_mix(table, wanted, density.overall)
    usual = mix_bits(table, wanted, density.overall, USUAL_MIX)
    return mix, every * (usual - bits) > 8 * (INPUTS + 1)


def _example_lag(counts: Integers) -> int:
    """Return the distance, 1 to 255, at which the rows' counts, `[rows]`, resemble each other most."""
    centred = counts - counts.mean()
    likeness = [float(centred[lag:] @ centred[:-lag]) for lag in range(1, min(256, len(counts) // 2))]
    return 1 + int(np.argmax(likeness)) if likeness else 1


def _entropy_bits(part: int, whole: int) -> float:
    shares = np.array([part, whole - part]) / whole
    return float(-whole * (shares * np.log2(shares.clip(1e-9))).sum())
