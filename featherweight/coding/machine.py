"""`scan` as machine code where the extra `speed` is installed, and as plain Python where it is not, to the same bits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

from featherweight.coding.scan import PARTS, scan

PATIENCE = 40_000
"""Symbols that a process scans in plain Python before it loads the compiler, which takes about as long."""


class _Meter:
    """Counts the symbols that this process has scanned in plain Python."""

    scanned = 0


def has_compiler() -> bool:
    """Say whether the extra `speed` is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled() -> Callable[..., int]:
    """Return `scan` as machine code, which stays on disk after the first time.

    Raises:
        ModuleNotFoundError: the extra `speed` is not installed.
    """
    numba, extending = importlib.import_module("numba"), importlib.import_module("numba.extending")
    for part in PARTS:
        extending.register_jitable(forceinline=True)(part)
    try:
        made: Callable[..., int] = numba.njit(scan, cache=True, error_model="numpy")
    except RuntimeError:  # no folder where machine code could be kept
        made = numba.njit(scan, error_model="numpy")
    return made


def run(arguments: tuple[Any, ...], fast: bool | None = None) -> int:
    """Call `scan` and return what it returns.

    Args:
        arguments: those of `scan`, arrays; symbols and data are changed in place, the others may be.
        fast: compiled or in plain Python; None chooses.
    """
    symbols, data, *others = arguments
    if fast is None:
        _Meter.scanned += symbols.size
        fast = _Meter.scanned > PATIENCE and has_compiler()
    if fast:
        return compiled()(*arguments)
    # lists are several times quicker to read and write than arrays, number by number
    rows, stream = symbols.tolist(), bytearray(data.tobytes())
    end = scan(rows, stream, *(item.tolist() if hasattr(item, "tolist") else item for item in others))
    symbols[...], data[...] = rows, memoryview(stream)
    return end
