"""How a report writes a number, a ratio and a stranger's name."""

from __future__ import annotations

import math
from collections.abc import Mapping

from featherweight.verdict import METRICS, format_amount

NOT_MEASURED = "not measured"
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def clean(text: object) -> str:
    """Return text without control, direction-changing and lone surrogate characters; names come from strangers."""
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def amount(metric: str, value: float | None) -> str:
    """Return an amount for people, `"44.71 MB"`, or that it was not measured."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return format_amount(metric, value) if metric in METRICS else f"{value:,.4g}"


def number(value: float | None) -> str:
    """Return a score for people, with four decimals where it is small."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.5g}"


def percent(share: float) -> str:
    """Return 0.24 as `24 %`, with two digits below 10 %."""
    value = 100 * share
    if 0 < value < 0.01:
        return "less than 0.01 %"
    return f"{value:,.0f} %" if value >= 10 else f"{value:.2g} %"


def duration(seconds: float | None) -> str:
    """Return a time of work for people: `0.8 s`, `4 min 10 s`, `1 h 5 min`."""
    if seconds is None or not math.isfinite(seconds):
        return NOT_MEASURED
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def ratio(before: float | None, after: float | None) -> float | None:
    """Return how many times smaller `after` is, or None where that says nothing."""
    return before / after if before and after and before > 0 and after > 0 else None


def times(before: float | None, after: float | None, less: str, more: str) -> str:
    """Return `76.9x smaller`, `1.2x larger`, `2 % fewer`, `unchanged`, or nothing where one side was not measured."""
    smaller = ratio(before, after)
    if smaller is None:
        return ""
    if before == after:
        return "unchanged"
    word, size = (less, smaller) if smaller >= 1 else (more, 1 / smaller)
    # 1.00x says nothing: near one the part that went is clearer.
    return f"{factor(size)} {word}" if size >= 1.1 else f"{percent(1 - 1 / size if smaller > 1 else size - 1)} {word}"


def factor(value: float) -> str:
    """Return a ratio with the digits it deserves: `120x`, `26.4x`, `1.02x`."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def spread(timed: Mapping[str, float] | None) -> str:
    """Return a latency with its quartiles: `4.1 ms (3.9-4.4)`."""
    if not timed:
        return NOT_MEASURED
    median = amount("latency", timed["median"])
    scale = _SECONDS[median.split()[-1]]
    return f"{median} ({timed['low'] / scale:.3g}-{timed['high'] / scale:.3g})"


def digits(value: float | None) -> str:
    """Return three digits of a number, or `unknown`."""
    return "unknown" if value is None else f"{value:.3g}"


def points(drop: float) -> str:
    """Return a drop of a score in hundredths, three digits: `0.556 pt`."""
    return format_amount("drop", float(f"{drop:.3g}"))


def shorten(text: object, length: int, tail: float = 0.0) -> str:
    """Return the text on one line, and where it is longer cut.

    Args:
        text: any text.
        length: most characters.
        tail: share of them kept from the end; a dotted path says most there, a call at its start.
    """
    line = " ".join(clean(text).split())
    if len(line) <= length:
        return line
    last = min(int(length * tail), length - 1)
    return f"{line[: length - last - 1]}…{line[len(line) - last :]}"
