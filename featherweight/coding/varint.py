"""Numbers of any size as few bytes, and a reader that never runs past the end.

A varint is LEB128 (DWARF standard, section 7.6): seven bits a byte, low ones first, the top bit set on all but one.
"""

from __future__ import annotations

from featherweight.errors import ArtifactError

_LONGEST = 10

Bytes = bytes | memoryview
"""What is read from: a file's bytes, or a view of a part of them."""


def varint(number: int) -> bytes:
    """Write a number in [0, 2**70) as 1 to 10 bytes.

    Raises:
        ValueError: the number is out of range.
    """
    if not 0 <= number < 1 << (7 * _LONGEST):
        raise ValueError(f"varint takes 0 to 2**{7 * _LONGEST} - 1, got {number}")
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def signed_varint(number: int) -> bytes:
    """Write a number of either sign, small magnitudes in few bytes (zigzag: 0, -1, 1, -2, …)."""
    return varint(2 * number if number >= 0 else -2 * number - 1)


def framed(section: bytes) -> bytes:
    """Return the section with its length in front, as a varint."""
    return varint(len(section)) + section


class Reader:
    """Reads bytes from the front; a demand for more than is left is an `ArtifactError`.

    Args:
        data: the bytes to read.
        what: what they are, for messages.
    """

    def __init__(self, data: Bytes, what: str) -> None:
        self.data = memoryview(data)  # slices of it are no copies
        self.what = what
        self.position = 0

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes.

        Raises:
            ArtifactError: fewer are left.
        """
        if count > self.left():
            raise ArtifactError(
                f"{self.what}: cut short, {count} bytes expected at {self.position}, {self.left()} left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def left(self) -> int:
        """Return how many bytes are not read yet."""
        return len(self.data) - self.position

    def rest(self) -> memoryview:
        """Return all bytes not read yet."""
        return self.take(self.left())

    def byte(self) -> int:
        """Return the next byte as a number in [0, 255]."""
        return self.take(1)[0]

    def varint(self, most: int) -> int:
        """Return the next varint, in [0, most].

        Raises:
            ArtifactError: the bytes end within it, or it exceeds `most`.
        """
        number = 0
        for place in range(_LONGEST):
            part = self.byte()
            number |= (part & 127) << (7 * place)
            if part < 128:
                break
        if part >= 128 or number > most:
            raise ArtifactError(f"{self.what}: a number before byte {self.position} exceeds its bound, {most}")
        return number

    def signed_varint(self, most: int) -> int:
        """Return the next zigzag varint, of magnitude at most `most`."""
        number = self.varint(2 * most)
        return number // 2 if number % 2 == 0 else -(number + 1) // 2

    def framed(self) -> memoryview:
        """Return the next section that has its length in front."""
        return self.take(self.varint(len(self.data)))

    def end(self) -> None:
        """Check that everything was read.

        Raises:
            ArtifactError: bytes are left over.
        """
        if self.left():
            raise ArtifactError(f"{self.what}: {self.left()} bytes too many at the end")
