"""Joules of one call: read from the CPU's own counter where the machine lets it be read, else time times a stated wattage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_COUNTERS = Path("/sys/class/powercap")
_SECONDS = 0.5


def counters(folder: Path = _COUNTERS) -> list[Path]:
    """Return the RAPL counters of whole packages that can be read here, in microjoules; none on most virtual machines."""
    found = []
    for path in sorted(folder.glob("intel-rapl:?/energy_uj")):
        try:
            int(path.read_text())
        except (OSError, ValueError):
            continue
        found.append(path)
    return found


def joules(
    call: Callable[[], object], seconds_a_call: float, watts: float, folder: Path = _COUNTERS
) -> tuple[float, str]:
    """Return the energy of one call and how it was had: `"RAPL"`, or `"estimate"` from the wattage.

    Args:
        call: run again and again for half a second where there is a counter.
        seconds_a_call: median time of one call.
        watts: what a busy core is stated to take, where there is no counter.
        folder: of the counters.
    """
    readable = counters(folder)
    if not readable:
        return seconds_a_call * watts, "estimate"
    first = [int(path.read_text()) for path in readable]
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        call()
        calls += 1
    spent = 0
    for path, before in zip(readable, first, strict=True):
        after = int(path.read_text())
        spent += (
            after - before
            if after >= before
            else after + int(path.with_name("max_energy_range_uj").read_text()) - before
        )
    return spent * 1e-6 / calls, "RAPL"
