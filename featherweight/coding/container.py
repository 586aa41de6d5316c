"""One file of sections with checksums: 8 bytes in all, 1 to 3 bytes a section, and 2 more for one of 1 KiB or more.

Layout: "FW", version byte, varint count, varint lengths, the sections, CRC-32 of all before (big-endian). A section of
`LONG` bytes or more is followed by the low half of its own CRC-32, so that it can be read alone; a short one is not,
because small files are made of short ones, and the last checksum covers them.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from featherweight.coding.varint import Reader, varint
from featherweight.errors import ArtifactError

MAGIC = b"FW"
VERSION = 3
_READ = (2, VERSION)  # the second lists every tensor of every layer, which the third may still do
MOST_SECTIONS = 100_000
MOST_BYTES = 1 << 40
LONG = 1024

_CHECKSUM_BYTES, _OWN_BYTES = 4, 2
_SHORTEST = len(MAGIC) + 2 + _CHECKSUM_BYTES
_CHUNK = 1 << 20  # bytes read at once for the checksum; no table of lengths is longer


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


class Sections:
    """The sections of a file that `pack` wrote, read one at a time, so that no more than one is in memory.

    Args:
        file: binary, readable and seekable; it stays open for as long as sections are read.
        source: its name, for messages.

    Raises:
        ArtifactError: the file is foreign, of another version, cut short or too long; the message names the source and the
            reason.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file, self.source = file, source
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)
        reader = _opened(file.read(_CHUNK), self._size, source)
        self._lengths = [reader.varint(MOST_BYTES) for _ in range(reader.varint(MOST_SECTIONS))]
        self._starts, end = [], reader.position
        for length in self._lengths:
            self._starts.append(end)
            end += length + _own_bytes(length)
        missing = end + _CHECKSUM_BYTES - self._size
        if missing > 0:
            raise ArtifactError(f"{source}: cut short, {missing} bytes are missing, or damaged")
        if missing < 0:
            raise ArtifactError(f"{source}: {-missing} bytes too many at the end, or damaged")

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, place: int) -> bytes:
        """Return one section without a look at the others; a short one's own bytes are not checked.

        Raises:
            ArtifactError: there is no such section, or its checksum does not match.
        """
        if not 0 <= place < len(self):
            raise ArtifactError(f"{self.source}: no section {place}, there are {len(self)}")
        part, own = self._read(place)
        if own not in (b"", _own(part)):
            raise ArtifactError(f"{self.source}: the checksum of section {place} does not match, the file is damaged")
        return part

    def __iter__(self) -> Iterator[bytes]:
        for place in range(len(self)):
            yield self[place]

    def check(self) -> Sections:
        """Return itself after a look at the checksum of the whole file.

        Raises:
            ArtifactError: it does not match; the message names the damaged section, where one can be told.
        """
        self._file.seek(0)
        found, left = 0, self._size - _CHECKSUM_BYTES
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            found, left = zlib.crc32(chunk, found), left - len(chunk)
        if found != int.from_bytes(self._file.read(_CHECKSUM_BYTES), "big"):
            parts = map(self._read, range(len(self)))
            bad = [place for place, (part, own) in enumerate(parts) if own not in (b"", _own(part))]
            where = f" in section {bad[0]}" if bad else ""
            raise ArtifactError(
                f"{self.source}: the checksum does not match, the file is damaged{where}; copy or build it again"
            )
        return self

    def _read(self, place: int) -> tuple[bytes, bytes]:
        self._file.seek(self._starts[place])
        return self._file.read(self._lengths[place]), self._file.read(_own_bytes(self._lengths[place]))


def unpack(data: bytes, source: str) -> list[bytes]:
    """Return the sections of a file that `pack` wrote, checked as a whole.

    Args:
        data: the whole file.
        source: its name, for messages.

    Raises:
        ArtifactError: the file is foreign, of another version, cut short, too long, or damaged; the message names the
            source and the reason.
    """
    return list(Sections(io.BytesIO(data), source).check())


def _opened(start: bytes, size: int, source: str) -> Reader:
    """Return a reader behind the version byte of a file of `size` bytes that starts so."""
    if start[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{source}: not a Featherweight file (it begins with {start[:4]!r}, not {MAGIC!r})")
    if size < _SHORTEST:
        raise ArtifactError(f"{source}: cut short, {size} bytes where at least {_SHORTEST} are expected")
    reader = Reader(start[: size - _CHECKSUM_BYTES], source)
    reader.take(len(MAGIC))
    version = reader.byte()
    if version not in _READ:
        raise ArtifactError(
            f"{source}: version {version} of the format; this Featherweight reads versions {' and '.join(map(str, _READ))}"
        )
    return reader


def _own_bytes(length: int) -> int:
    """Return how many bytes of checksum follow a section of this length."""
    return _OWN_BYTES if length >= LONG else 0


def _own(part: bytes) -> bytes:
    return (zlib.crc32(part) & 0xFFFF).to_bytes(_OWN_BYTES, "big")


def _checked(part: bytes) -> bytes:
    return part + _own(part) if len(part) >= LONG else part
