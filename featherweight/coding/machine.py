"""Loops over numbers as machine code where the extra `speed` is installed, and as plain Python where it is not, to the same bits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

Loop = Callable[..., Any]
"""A function of numbers, truth values, tuples of them and arrays, indexed number by number, that calls nothing but its parts."""

PATIENCE = 40_000
"""Symbols that a process scans in plain Python before it loads the compiler, which takes about as long."""


class _Meter:
    """Counts the symbols that this process has scanned in plain Python."""

    scanned = 0


def has_compiler() -> bool:
    """Say whether the extra `speed` is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled(loop: Loop, parts: tuple[Loop, ...]) -> Loop:
    """Return a loop as machine code, which stays on disk after the first time.

    Args:
        loop: a function of a module.
        parts: what it calls, in order.

    Raises:
        ModuleNotFoundError: the extra `speed` is not installed.
    """
    numba, extending = importlib.import_module("numba"), importlib.import_module("numba.extending")
    for part in parts:
        extending.register_jitable(forceinline=True)(part)
    try:
        made: Loop = numba.njit(loop, cache=True, error_model="numpy")
    except RuntimeError:  # no folder where machine code could be kept
        made = numba.njit(loop, error_model="numpy")
    return made


def run(loop: Loop, parts: tuple[Loop, ...], changed: int, arguments: tuple[Any, ...], fast: bool | None = None) -> Any:
    """Call a loop and return what it returns.

    Args:
        loop: a function of a module.
        parts: what it calls, in order.
        changed: how many of its arguments, from the first on, are arrays that it changes in place; the others it may.
        arguments: those of the loop; the first has an entry for each symbol.
        fast: compiled or in plain Python; None chooses.
    """
    if fast is None:
        _Meter.scanned += arguments[0].size
        fast = _Meter.scanned > PATIENCE and has_compiler()
    if fast:
        return compiled(loop, parts)(*arguments)
    plain = [_plain(argument) for argument in arguments]
    result = loop(*plain)
    for array, values in zip(arguments[:changed], plain, strict=False):
        array[...] = memoryview(values) if isinstance(values, bytearray) else values
    return result


def _plain(argument: Any) -> Any:
    """Bytes and lists are several times quicker to read and write than arrays, number by number."""
    if not hasattr(argument, "tolist"):
        return argument
    return bytearray(argument.tobytes()) if argument.dtype == "uint8" else argument.tolist()
