"""This machine's CPU: its name, its instruction sets, and what they say of integer arithmetic."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

_INFO = Path("/proc/cpuinfo")


def name() -> str:
    """Return what the CPU is called, as far as that can be read."""
    return _told("model name") or platform.processor() or platform.machine()


@cache
def instructions() -> frozenset[str]:
    """Return the names of the CPU's instruction sets, as Linux writes them, as far as they can be read."""
    if _INFO.exists():
        return frozenset(_told("flags").split())
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return frozenset(name for name, there in known.items() if there is True)


def sums_overflow() -> bool:
    """Return whether integer kernels add products of bytes in 16 bits: x86 without VNNI, or of which nothing is known."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not instructions() & {"avx512_vnni", "avx_vnni", "amx_int8"}


def _told(key: str) -> str:
    """What Linux says of the first core."""
    lines = (line.partition(":") for line in _INFO.read_text().splitlines()) if _INFO.exists() else ()
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
