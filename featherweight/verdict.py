"""How a compressed model stands against its limits: one row a limit, in words and in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from featherweight.errors import BudgetError, closest

_BYTES = {"B": "1", "KB": "1e3", "MB": "1e6", "GB": "1e9", "KiB": "1024", "MiB": "1048576", "GiB": "1073741824"}
_COUNTS = {"": "1", "k": "1e3", "M": "1e6", "G": "1e9"}
_SECONDS = {"us": "1e-6", "ms": "1e-3", "s": "1"}


class _Metric(NamedTuple):
    fact: str  # the attribute of Facts
    units: dict[str, str]  # unit: what one of it is, in bytes, counts, seconds or score units
    examples: str


METRICS = {
    "size": _Metric("size_bytes", _BYTES, "size<=500KB, size<=25% or size<=4x"),
    "params": _Metric("params", _COUNTS, "params<=100k, params<=25% or params<=4x"),
    "macs": _Metric("macs", _COUNTS, "macs<=2M, macs<=25% or macs<=4x"),
    "latency": _Metric("latency_seconds", _SECONDS, "latency<=4ms, latency<=50% or latency<=2x"),
    "memory": _Metric("peak_bytes", _BYTES, "memory<=64MiB, memory<=50% or memory<=2x"),
    "drop": _Metric("score", {"pt": "0.01"}, "drop<=0.5pt (0.005 of the score) or drop<=1% (of the original's score)"),
}


class Facts(Protocol):
    """What `judge` reads of a measured model; None stands for not measured."""

    @property
    def score(self) -> float | None:
        """Score on the data the verdict is about, in its own units."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""

    @property
    def size_bytes(self) -> int | None:
        """Length of the file in bytes."""

    @property
    def params(self) -> int | None:
        """Number of stored elements."""

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one call."""

    @property
    def latency_seconds(self) -> float | None:
        """Time of one call in seconds."""

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of one call in bytes."""


@dataclass(frozen=True)
class Row:
    """One limit of a verdict; amounts in bytes, counts, seconds or score units, None where not measured.

    Attributes:
        metric: the limited metric.
        limit_text: the limit as written in a budget, for example `"size<=25%"`.
        allowed: the largest value that keeps the limit.
        before: the original's value; for a drop, its score.
        after: the compressed model's value; for a drop, the loss of score (negative when the score got better).
        met: whether the limit is kept.
        gap: `after / allowed - 1`; for a drop, `after - allowed`. At most 0 when met.
        reason: why there is no gap; empty when there is one.
    """

    metric: str
    limit_text: str
    allowed: float | None
    before: float | None
    after: float | None
    met: bool
    gap: float | None
    reason: str = ""

    @property
    def tightness(self) -> float:
        """The gap relative to what is allowed, for comparing metrics: above 0 is over, not measured is infinite."""
        if self.gap is None or self.allowed is None:
            return math.inf
        if self.metric != "drop" or not self.gap:
            return self.gap
        return self.gap / self.allowed if self.allowed else math.copysign(math.inf, self.gap)

    def __str__(self) -> str:
        if self.gap is None or self.allowed is None or self.after is None:
            return f"{self.limit_text} cannot be judged: {self.reason}"
        sign, word = ("<=", "to spare") if self.met else (">", "over")
        distance = format_amount("drop", abs(self.gap)) if self.metric == "drop" else _percent(abs(self.gap))
        after, allowed = format_amount(self.metric, self.after), format_amount(self.metric, self.allowed)
        return f"{self.metric} {after} {sign} {allowed} allowed ({distance} {word})"


@dataclass(frozen=True)
class Verdict:
    """How a compressed model stands against a budget, one row a limit and never none.

    `str(verdict)` is one sentence: the missed limits, or the tightest one when all are met.
    """

    rows: tuple[Row, ...]

    @property
    def met(self) -> bool:
        """Whether every limit is kept."""
        return all(row.met for row in self.rows)

    @property
    def binding(self) -> Row:
        """The row with the largest excess relative to what is allowed, or else with the smallest slack."""
        return max(self.rows, key=lambda row: row.tightness)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON types; a gap that is infinite (nothing was allowed) becomes None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["gap"] = row["gap"] if row["gap"] is not None and math.isfinite(row["gap"]) else None
        return {"met": self.met, "binding": self.binding.metric, "rows": rows}

    def __str__(self) -> str:
        if self.met:
            return f"budget met: {self.binding}"
        return "budget missed: " + "; ".join(str(row) for row in self.rows if not row.met)


def format_amount(metric: str, value: float) -> str:
    """Return an amount for people: `"12,400 B"`, `"44.71 MB"`, `"54.53 M"`, `"4.2 ms"`, `"0.5 pt"`.

    Args:
        metric: `size`, `params`, `macs`, `latency`, `memory` or `drop`.
        value: in bytes, counts, seconds or score units.

    Raises:
        BudgetError: the metric is unknown.
    """
    if metric not in METRICS:
        raise BudgetError(f"unknown metric {metric!r}.{closest(metric, METRICS)}")
    units = {unit: float(scale) for unit, scale in METRICS[metric].units.items() if "i" not in unit}
    smallest = next(iter(units))
    if metric not in ("latency", "drop") and abs(value) < 1e5:
        return f"{value:,.0f} {smallest}".rstrip()
    unit = max((unit for unit in units if abs(value) >= units[unit]), key=lambda unit: units[unit], default=smallest)
    return f"{value / units[unit]:,.4g} {unit}"


def _percent(share: float) -> str:
    """Return 0.24 as `24 %`, with two digits below 10 %."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "less than 0.01 %"
    return f"{percent:.0f} %" if percent >= 10 or math.isinf(percent) else f"{percent:.2g} %"
