"""One file of sections with checksums: 8 bytes in all, 1 to 3 bytes a section, and 2 more for one of 1 KiB or more.

Layout: "FW", version byte, varint count, varint lengths, the sections, CRC-32 of all before (big-endian). A section of
`LONG` bytes or more is followed by the low half of its own CRC-32, so that it can be read alone; a short one is not,
because small files are made of short ones, and the last checksum covers them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from featherweight.coding.varint import Bytes, Reader, varint
from featherweight.errors import ArtifactError

MAGIC = b"FW"
VERSION = 2
MOST_SECTIONS = 100_000
MOST_BYTES = 1 << 40
LONG = 1024

_CHECKSUM_BYTES, _OWN_BYTES = 4, 2
_SHORTEST = len(MAGIC) + 2 + _CHECKSUM_BYTES


def pack(sections: Sequence[bytes]) -> bytes:
    """Return one file that holds the sections, any number up to `MOST_SECTIONS`, in order.

    Raises:
        ArtifactError: there are more sections than a reader accepts.
    """
    if len(sections) > MOST_SECTIONS:
        raise ArtifactError(f"a file of {len(sections)} sections cannot be written: at most {MOST_SECTIONS}")
    lengths = b"".join(varint(len(section)) for section in sections)
    body = MAGIC + bytes([VERSION]) + varint(len(sections)) + lengths + b"".join(_checked(part) for part in sections)
    return body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")


def unpack(data: bytes, source: str) -> list[memoryview]:
    """Return views of the sections of a file that `pack` wrote.

    Args:
        data: the whole file.
        source: its name, for messages.

    Raises:
        ArtifactError: the file is foreign, of another version, cut short, too long, or damaged; the message names the
            source and the reason.
    """
    reader, lengths = _table(data, source)
    parts = [(reader.take(length), reader.take(_own_bytes(length))) for length in lengths]
    if zlib.crc32(reader.data) != int.from_bytes(data[-_CHECKSUM_BYTES:], "big"):
        bad = [place for place, (part, own) in enumerate(parts) if own not in (b"", _own(part))]
        where = f" in section {bad[0]}" if bad else ""
        raise ArtifactError(
            f"{source}: the checksum does not match, the file is damaged{where}; copy or build it again"
        )
    return [part for part, _ in parts]


def section(data: bytes, place: int, source: str) -> memoryview:
    """Return a view of one section of a file that `pack` wrote, without a look at the others.

    Args:
        data: the whole file.
        place: which section, from 0.
        source: the file's name, for messages.

    Raises:
        ArtifactError: as `unpack`, or there is no such section; a short one's own bytes are not checked.
    """
    reader, lengths = _table(data, source)
    if not 0 <= place < len(lengths):
        raise ArtifactError(f"{source}: no section {place}, there are {len(lengths)}")
    for length in lengths[:place]:
        reader.position += length + _own_bytes(length)
    part = reader.take(lengths[place])
    if reader.take(_own_bytes(len(part))) not in (b"", _own(part)):
        raise ArtifactError(f"{source}: the checksum of section {place} does not match, the file is damaged")
    return part


def _table(data: bytes, source: str) -> tuple[Reader, list[int]]:
    """Return a reader at the first section, and the lengths of all, which are those of the file."""
    if data[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{source}: not a Featherweight file (it begins with {data[:4]!r}, not {MAGIC!r})")
    if len(data) < _SHORTEST:
        raise ArtifactError(f"{source}: cut short, {len(data)} bytes where at least {_SHORTEST} are expected")
    reader = Reader(memoryview(data)[:-_CHECKSUM_BYTES], source)
    reader.take(len(MAGIC))
    version = reader.byte()
    if version != VERSION:
        raise ArtifactError(f"{source}: version {version} of the format; this Featherweight reads version {VERSION}")
    lengths = [reader.varint(MOST_BYTES) for _ in range(reader.varint(MOST_SECTIONS))]
    missing = sum(length + _own_bytes(length) for length in lengths) - (len(reader.data) - reader.position)
    if missing > 0:
        raise ArtifactError(f"{source}: cut short, {missing} bytes are missing, or damaged")
    if missing < 0:
        raise ArtifactError(f"{source}: {-missing} bytes too many at the end, or damaged")
    return reader, lengths


def _own_bytes(length: int) -> int:
    """Return how many bytes of checksum follow a section of this length."""
    return _OWN_BYTES if length >= LONG else 0


def _own(part: Bytes) -> bytes:
    return (zlib.crc32(part) & 0xFFFF).to_bytes(_OWN_BYTES, "big")


def _checked(part: bytes) -> bytes:
    return part + _own(part) if len(part) >= LONG else part
