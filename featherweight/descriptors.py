"""Keep what compiled libraries write to standard output and error from going there."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_C = ctypes.CDLL("msvcrt" if os.name == "nt" else None)


@contextlib.contextmanager
def nowhere(*descriptors: int) -> Iterator[None]:
    """Let nothing through to open file descriptors; those that are closed stay so.

    The whole process is meant, other threads too, but not what Python still holds in its own buffers.

    Args:
        descriptors: 1 for standard output, 2 for standard error.
    """
    kept = {}
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            kept[descriptor] = os.dup(descriptor)
    hole = os.open(os.devnull, os.O_WRONLY)
    _C.fflush(None)  # into a pipe or a file C writes when its buffer is full, or told to
    try:
        for descriptor in kept:
            os.dup2(hole, descriptor)
        yield
    finally:
        _C.fflush(None)
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(hole)
