"""Integer matrices to few bytes and back: several coders are tried and the shortest stream is kept.

Stream: a head byte (the way, plus 16 where the matrix was transposed first), then what that way needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featherweight.coding.adaptive import decode_adaptive, encode_adaptive
from featherweight.coding.fits import plans
from featherweight.coding.neighbours import LARGEST_ALPHABET as _LARGEST_NEIGHBOURS
from featherweight.coding.neighbours import MOST_COLUMNS, decode_neighbours, encode_neighbours
from featherweight.coding.varint import Bytes, Reader, framed, signed_varint, varint
from featherweight.errors import ArtifactError

LIMIT = 1 << 28
"""Most symbols that a decoder will make room for."""

READ_AT_ONCE = 1 << 20
SYMBOLS_PER_BYTE = 1 << 12
"""A stream of `n` bytes that is scanned in plain Python holds at most `READ_AT_ONCE + n * SYMBOLS_PER_BYTE` symbols: a forged
one could otherwise claim hours of work with a few bytes."""

_EMPTY, _CONSTANT, _RAW, _ADAPTIVE, _NEIGHBOURS, _SPARSE, _BYTES = range(7)
_TRANSPOSED = 16
_LARGEST_ALPHABET = 4096
_SPARSE_SHARE = 0.3
_SMALL = 1 << 14  # symbols up to which many plans are tried
_LARGE = 1 << 18  # symbols beyond which neighbours never cost more than they save
_MOST_NESTING = 5
_LEAST, _MOST = -(2**31), 2**31 - 1


def encode_symbols(symbols: NDArray[np.integer], period: int = 1) -> bytes:
    """Code an integer matrix losslessly.

    Args:
        symbols: values within int32, `[rows, columns]`, any number of either.
        period: columns after which a place means the same again: those of a convolution's kernel.

    Returns:
        A stream at most a few bytes longer than the values in the narrowest of 8, 16 or 32 bits.

    Raises:
        ArtifactError: not a matrix of integers, or a value beyond int32.
    """
    if symbols.ndim != 2 or symbols.dtype.kind not in "iu":
        raise ArtifactError(f"expected an integer matrix, got {symbols.dtype} of shape {list(symbols.shape)}")
    if symbols.size and (int(symbols.max()) > _MOST or int(symbols.min()) < _LEAST):
        raise ArtifactError(f"values must fit int32, got {symbols.min()} to {symbols.max()}")
    return min(_candidates(symbols, _MOST_NESTING, period), key=len)


def decode_symbols(data: Bytes, shape: tuple[int, int], dtype: DTypeLike = np.int32) -> NDArray[np.integer]:
    """Read a matrix that `encode_symbols` wrote.

    Args:
        data: the stream.
        shape: rows and columns of the matrix; trusted, except that `LIMIT` bounds their product.
        dtype: integer type to return, wide enough for the values.

    Returns:
        The matrix, `[rows, columns]`.

    Raises:
        ArtifactError: the bytes are no such stream, or hold a value beyond `dtype`.
    """
    rows, columns = shape
    if min(shape) < 0 or rows * columns > LIMIT:
        raise ArtifactError(f"symbol stream: a matrix of {rows} × {columns} exceeds {LIMIT} symbols")
    symbols = _decode(Reader(data, "symbol stream"), rows, columns, _MOST_NESTING)
    bounds = np.iinfo(np.dtype(dtype))
    if symbols.size and (int(symbols.min()) < bounds.min or int(symbols.max()) > bounds.max):
        raise ArtifactError(f"symbol stream: {symbols.min()} to {symbols.max()} does not fit {np.dtype(dtype)}")
    return symbols.astype(dtype, copy=False)


def _candidates(symbols: NDArray[np.integer], nesting: int, period: int = 1) -> Iterator[bytes]:
    """Yield streams of the matrix, `[rows, columns]`, that `_decode` reads."""
    if symbols.size == 0:
        yield bytes([_EMPTY])
        return
    least, most = int(symbols.min()), int(symbols.max())
    if least == most:
        yield bytes([_CONSTANT]) + signed_varint(least)
        return
    symbols = symbols.astype(np.int64) if most - least >= _LARGEST_ALPHABET else symbols.astype(np.int32)
    width = next(width for width in (1, 2, 4) if most - least < 1 << (8 * width))
    yield bytes([_RAW, width]) + signed_varint(least) + (symbols - least).astype(f"<u{width}").tobytes()
    if most - least < _LARGEST_ALPHABET:
        yield from _small_alphabet(symbols, least, most - least + 1, period)
    if width > 1 and nesting:
        yield from _nested(symbols, least, nesting, period)


def _small_alphabet(symbols: NDArray[np.integer], least: int, size: int, period: int) -> Iterator[bytes]:
    places, usual = (symbols - least).astype(np.int32), min(max(0, -least), size - 1)
    even = 2 * least == 1 - size  # as many values below zero as above: the size says it all
    alphabet = varint(2 * (size - 2) + even) + (b"" if even else signed_varint(least))
    small = min(places.shape) > 1 and places.size <= _SMALL
    fits = size <= _LARGEST_NEIGHBOURS and max(places.shape) <= MOST_COLUMNS
    believable = False
    flips = () if not fits else (0, _TRANSPOSED) if small and period == 1 else (0,)
    for flip in flips:
        scan = np.ascontiguousarray(places.T) if flip else places
        for plan in plans(scan, size, usual, period, small):
            stream = encode_neighbours(plan, scan, usual)
            if _believable(len(stream), places.size):
                believable = True
                yield bytes([_NEIGHBOURS | flip]) + alphabet + stream
    if places.size <= _LARGE or not believable:
        yield bytes([_ADAPTIVE]) + alphabet + encode_adaptive(places.reshape(-1), size, usual)


def _believable(length: int, count: int) -> bool:
    return count <= READ_AT_ONCE + length * SYMBOLS_PER_BYTE


def _nested(symbols: NDArray[np.integer], least: int, nesting: int, period: int) -> Iterator[bytes]:
    """Yield streams of wide values: high and low bytes, and the commonest value told apart from the others."""
    low, high = (symbols - least) & 255, (symbols - least) >> 8
    parts = [min(_candidates(part, nesting - 1, period), key=len) for part in (high, low)]
    yield bytes([_BYTES]) + signed_varint(least) + framed(parts[0]) + parts[1]
    values, counts = np.unique(symbols, return_counts=True)
    common = values[counts.argmax()]
    if counts.max() >= _SPARSE_SHARE * symbols.size:
        filled = symbols != common
        flags = min(_candidates(filled.astype(np.int32), nesting - 1, period), key=len)
        rest = min(_candidates(symbols[filled][None], nesting - 1), key=len)
        yield bytes([_SPARSE]) + signed_varint(int(common)) + framed(flags) + rest


def _decode(reader: Reader, rows: int, columns: int, nesting: int) -> NDArray[np.integer]:
    head = reader.byte()
    way, flip = head % _TRANSPOSED, head >= _TRANSPOSED
    if way > _BYTES or head >= 2 * _TRANSPOSED or (way == _EMPTY) != (rows * columns == 0) or nesting < 0:
        raise ArtifactError(f"{reader.what}: head {head} does not fit {rows} × {columns} symbols")
    if way == _EMPTY:
        return np.zeros((rows, columns), np.int64)
    if flip:
        rows, columns = columns, rows
    symbols = _WAYS[way](reader, rows, columns, nesting).reshape(rows, columns)
    return np.ascontiguousarray(symbols.T) if flip else symbols


def _constant(reader: Reader, rows: int, columns: int, _nesting: int) -> NDArray[np.int64]:
    return np.full((rows, columns), reader.signed_varint(-_LEAST), np.int64)


def _raw(reader: Reader, rows: int, columns: int, _nesting: int) -> NDArray[np.int64]:
    width = reader.byte()
    if width not in (1, 2, 4):
        raise ArtifactError(f"{reader.what}: {width} bytes a value")
    least = reader.signed_varint(-_LEAST)
    return np.frombuffer(reader.take(rows * columns * width), f"<u{width}").astype(np.int64) + least


def _alphabet(reader: Reader) -> tuple[int, int, int]:
    """Return the least value, the number of values from there, and the place where zero is, or nearest to it."""
    size, even = divmod(reader.varint(2 * (_LARGEST_ALPHABET - 2) + 1) + 4, 2)
    least = (1 - size) // 2 if even else reader.signed_varint(-_LEAST)
    return least, size, min(max(0, -least), size - 1)


def _adaptive(reader: Reader, rows: int, columns: int, _nesting: int) -> NDArray[np.int64]:
    least, size, usual = _alphabet(reader)
    return decode_adaptive(reader, rows * columns, size, usual).astype(np.int64) + least


def _neighbours(reader: Reader, rows: int, columns: int, _nesting: int) -> NDArray[np.integer]:
    least, size, usual = _alphabet(reader)
    if size > _LARGEST_NEIGHBOURS or columns > MOST_COLUMNS:
        raise ArtifactError(f"{reader.what}: {size} symbols in {columns} columns are not for way {_NEIGHBOURS}")
    if not _believable(reader.left(), rows * columns):
        raise ArtifactError(f"{reader.what}: {reader.left()} bytes cannot hold {rows} × {columns} symbols")
    symbols = decode_neighbours(reader, rows, columns, size, usual)
    if abs(least) > _LARGEST_ALPHABET:
        return symbols + np.int64(least)
    symbols += np.int16(least)
    return symbols


def _sparse(reader: Reader, rows: int, columns: int, nesting: int) -> NDArray[np.int64]:
    common = reader.signed_varint(-_LEAST)
    filled = _decode(Reader(reader.framed(), reader.what), rows, columns, nesting - 1) > 0
    symbols = np.full((rows, columns), common, np.int64)
    symbols[filled] = _decode(reader, 1, int(filled.sum()), nesting - 1)[0]
    return symbols


def _bytes(reader: Reader, rows: int, columns: int, nesting: int) -> NDArray[np.integer]:
    least = reader.signed_varint(-_LEAST)
    high = _decode(Reader(reader.framed(), reader.what), rows, columns, nesting - 1)
    low = _decode(reader, rows, columns, nesting - 1)
    return (high.astype(np.int64) << 8) + low + least


_WAYS = {
    _CONSTANT: _constant,
    _RAW: _raw,
    _ADAPTIVE: _adaptive,
    _SPARSE: _sparse,
    _BYTES: _bytes,
    _NEIGHBOURS: _neighbours,
}
