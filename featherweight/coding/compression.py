"""General-purpose compression without headers, for manifests: the shortest of stored, Deflate (RFC 1951) and LZMA."""

from __future__ import annotations

import lzma
import zlib

from featherweight.coding.varint import Bytes
from featherweight.errors import ArtifactError

_STORED, _DEFLATE, _LZMA = range(3)
_WINDOW_BITS = -15  # negative: no zlib header and checksum, the container has its own
_FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]


def deflate(data: bytes, dictionary: bytes = b"") -> bytes:
    """Compress bytes; the stream is at most one byte longer.

    Args:
        data: what to compress.
        dictionary: bytes that resemble the data, likeliest last, at most 32 KiB count; the reader needs the same.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, _WINDOW_BITS, 9, zlib.Z_DEFAULT_STRATEGY, dictionary[-32768:])
    candidates = [
        bytes([_STORED]) + data,
        bytes([_DEFLATE]) + coder.compress(data) + coder.flush(),
        bytes([_LZMA]) + lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS),
    ]
    return min(candidates, key=len)


def inflate(data: Bytes, limit: int, dictionary: bytes = b"") -> bytes:
    """Return what `deflate` was given.

    Args:
        data: the stream.
        limit: most bytes to return; memory stays within a small multiple of it.
        dictionary: the one it was compressed with.

    Raises:
        ArtifactError: the stream is damaged, or holds more than `limit` bytes.
    """
    way, body = data[:1], data[1:]
    try:
        if way == bytes([_STORED]):
            plain = bytes(body)
        elif way == bytes([_DEFLATE]):
            plain = _inflate_deflate(body, limit, dictionary)
        elif way == bytes([_LZMA]):
            plain = _inflate_lzma(body, limit)
        else:
            raise ArtifactError(f"compressed section: unknown way {bytes(way)!r}")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"compressed section: damaged ({error})") from error
    if len(plain) > limit:
        raise ArtifactError(f"compressed section: it holds more than the {limit} bytes that are allowed")
    return plain


def _inflate_deflate(body: Bytes, limit: int, dictionary: bytes) -> bytes:
    coder = zlib.decompressobj(_WINDOW_BITS, dictionary[-32768:])
    plain = coder.decompress(body, limit + 1)
    return _whole(plain, limit, coder.eof and not coder.unused_data)


def _inflate_lzma(body: Bytes, limit: int) -> bytes:
    coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    plain = coder.decompress(body, limit + 1)
    return _whole(plain, limit, coder.eof and not coder.unused_data)


def _whole(plain: bytes, limit: int, ended: bool) -> bytes:
    if len(plain) <= limit and not ended:
        raise ArtifactError("compressed section: damaged (it does not end where it should)")
    return plain
