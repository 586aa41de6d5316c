"""One file of sections with a checksum: 8 bytes in all and 1 to 3 bytes a section.

Layout: "FW", version byte, varint count, varint lengths, the sections, CRC-32 of all before (big-endian).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from featherweight.coding.varint import Reader, varint
from featherweight.errors import ArtifactError

MAGIC = b"FW"
VERSION = 1
MOST_SECTIONS = 100_000
MOST_BYTES = 1 << 40

_CHECKSUM_BYTES = 4
_SHORTEST = len(MAGIC) + 2 + _CHECKSUM_BYTES


def pack(sections: Sequence[bytes]) -> bytes:
    """Return one file that holds the sections, any number up to `MOST_SECTIONS`, in order.

    Raises:
        ArtifactError: there are more sections than a reader accepts.
    """
    if len(sections) > MOST_SECTIONS:
        raise ArtifactError(f"a file of {len(sections)} sections cannot be written: at most {MOST_SECTIONS}")
    lengths = b"".join(varint(len(section)) for section in sections)
    body = MAGIC + bytes([VERSION]) + varint(len(sections)) + lengths + b"".join(sections)
    return body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")


def unpack(data: bytes, source: str) -> list[bytes]:
    """Return the sections of a file that `pack` wrote.

    Args:
        data: the whole file.
        source: its name, for messages.

    Raises:
        ArtifactError: the file is foreign, of another version, cut short, too long, or damaged; the message names the
            source and the reason.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{source}: not a Featherweight file (it begins with {data[:4]!r}, not {MAGIC!r})")
    if len(data) < _SHORTEST:
        raise ArtifactError(f"{source}: cut short, {len(data)} bytes where at least {_SHORTEST} are expected")
    reader = Reader(data[:-_CHECKSUM_BYTES], source)
    reader.take(len(MAGIC))
    version = reader.byte()
    if version != VERSION:
        raise ArtifactError(f"{source}: version {version} of the format; this Featherweight reads version {VERSION}")
    lengths = [reader.varint(MOST_BYTES) for _ in range(reader.varint(MOST_SECTIONS))]
    missing = sum(lengths) - (len(reader.data) - reader.position)
    if missing > 0:
        raise ArtifactError(f"{source}: cut short, {missing} bytes are missing, or damaged")
    if missing < 0:
        raise ArtifactError(f"{source}: {-missing} bytes too many at the end, or damaged")
    if zlib.crc32(reader.data) != int.from_bytes(data[-_CHECKSUM_BYTES:], "big"):
        raise ArtifactError(f"{source}: the checksum does not match, the file is damaged; copy or build it again")
    return [reader.take(length) for length in lengths]
