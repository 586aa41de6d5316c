"""A budget is text such as `"size<=25%, latency<=4ms, drop<=0.5pt"`; it judges a model against its original."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from featherweight.errors import BudgetError, closest
from featherweight.verdict import METRICS, Facts, Row, Verdict

Form = Literal["absolute", "share", "factor"]

_PART = re.compile(r"(?P<metric>[^<>=≤≥:\s]*)\s*(?P<operator>[<>=≤≥:]*)\s*(?P<value>.*)", re.DOTALL)
_VALUE = re.compile(r"(?P<number>[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*(?P<unit>[^\s0-9.]*)")
_TIE = 1e-9  # relative; 0.915 - 0.91 is 0.0050000000000000044 in floating point, and meets drop<=0.5pt


@dataclass(frozen=True)
class Limit:
    """The most that one metric may be.

    Attributes:
        metric: `size`, `params`, `macs`, `latency`, `memory` or `drop`.
        amount: for `"absolute"` bytes, counts, seconds or (drop) score units; for `"share"` the part of the original,
            0.25 for `25%`; for `"factor"` what the original is divided by, 10 for `10x`. Positive; a drop may be 0.
        form: how `amount` is meant.

    Raises:
        BudgetError: the metric is unknown, or the amount is out of range or does not suit the metric.
    """

    metric: str
    amount: float
    form: Form

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            floor = " To keep a score up, limit its drop: drop<=0.5pt." if self.metric in ("score", "accuracy") else ""
            raise BudgetError(f"unknown metric {self.metric!r}.{floor or closest(self.metric, METRICS)}")
        example = f"write for example {METRICS[self.metric].examples}"
        if self.form not in ("absolute", "share", "factor") or (self.metric == "drop" and self.form == "factor"):
            raise BudgetError(f"{self.metric} cannot be limited by a {self.form}; {example}")
        if not math.isfinite(self.amount) or self.amount < 0 or (self.amount == 0 and self.metric != "drop"):
            raise BudgetError(f"the limit {self.amount:g} of {self.metric} is no positive finite number; {example}")
        if self.form == "factor" and self.amount < 1:
            raise BudgetError(
                f"{self.amount:g}x would allow {1 / self.amount:g} times the original, since 10x means a tenth of it; "
                f"{example}"
            )

    def __str__(self) -> str:
        return f"{self.metric}<={self._amount()}"

    def _amount(self) -> str:
        exact = Decimal(repr(float(self.amount)))
        if self.form == "share":
            return _plain(exact * 100) + "%"
        if self.form == "factor":
            return _plain(exact) + "x"
        units = [(unit, Decimal(scale)) for unit, scale in METRICS[self.metric].units.items() if "i" not in unit]
        fitting = [(unit, scale) for unit, scale in units if exact >= scale] or units[:1]
        if (
            self.metric in ("params", "macs") and exact != exact.to_integral_value()
        ):  # without a unit it would have to be an integer
            fitting = [units[1]]
        return min((_plain(exact / scale) + unit for unit, scale in reversed(fitting)), key=len)

    def allowed(self, original: float) -> float:
        """Return the largest value that keeps the limit, in bytes, counts, seconds or score units.

        Args:
            original: the metric of the original model, in the same unit; for a drop, the original's score. An absolute
                limit does not look at it.
        """
        if self.form == "share":
            return self.amount * abs(original)
        return self.amount if self.form == "absolute" else original / self.amount


@dataclass(frozen=True)
class Budget:
    """Upper limits on a compressed model, at most one a metric; `str(budget)` is text that `parse` reads back."""

    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        if not self.limits:
            raise BudgetError("the budget is empty; write for example 'size<=25%, drop<=0.5pt'")
        for metric in (names := [limit.metric for limit in self.limits]):
            if names.count(metric) > 1:
                raise BudgetError(f"{metric} is limited {names.count(metric)} times; keep the tighter limit")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget such as `"size<=25%, latency<=4ms, drop<=0.5pt"`.

        Limits are absolute (`500KB`, `3ms`, `2M`), a share of the original (`25%`) or a factor below it (`10x`). `KB`
        is 1000 bytes, `KiB` 1024; `pt` is a hundredth of the score; case and spaces do not matter.

        Raises:
            BudgetError: the text cannot be read; the message has the text, the part and what would work.
        """
        if not isinstance(text, str):
            raise BudgetError(f"a budget is text such as 'size<=25%, drop<=0.5pt', not {type(text).__name__} {text!r}")
        part = text
        try:
            if separator := re.search(r"[0-9]+,[0-9]+", text):
                raise BudgetError(f"write {separator[0]!r} without the comma, which separates limits")
            limits = []
            for part in text.split(",") if text.strip() else ():
                limits.append(_limit(part.strip()))
            part = text
            return cls(tuple(limits))
        except BudgetError as error:
            where = f": {part.strip()!r}" if part != text else ""
            raise BudgetError(f"budget {text!r}{where}: {error}") from None

    def limit(self, metric: str) -> Limit | None:
        """Return the limit on a metric, or None when it has none."""
        return next((limit for limit in self.limits if limit.metric == metric), None)

    def judge(self, before: Facts, after: Facts) -> Verdict:
        """Compare a compressed model with its original; a metric that was not measured is not met.

        Raises:
            BudgetError: the two disagree on whether a higher score is better.
        """
        if before.higher_is_better != after.higher_is_better:
            raise BudgetError(
                f"higher_is_better is {before.higher_is_better} before and {after.higher_is_better} after: "
                "two different scores cannot be compared"
            )
        return Verdict(tuple(_row(limit, before, after) for limit in self.limits))

    def __str__(self) -> str:
        return ", ".join(str(limit) for limit in self.limits)


def _limit(part: str) -> Limit:
    """Read one limit, such as `latency <= 4 ms`; the messages are completed by `Budget.parse`."""
    match = _PART.fullmatch(part)
    metric, operator, value = match.group("metric", "operator", "value") if match else ("", "", part)
    metric = metric.lower()
    if not part:
        raise BudgetError("a comma separates two limits, and here one is missing")
    if metric not in METRICS:
        Limit(metric or part, 1.0, "share")  # raises, with the nearest names
    example = f"write for example {METRICS[metric].examples}"
    if operator not in ("<=", "<", "≤"):
        why = (
            "a budget has upper limits only" if ">" in operator or "≥" in operator else "a limit needs <= and an amount"
        )
        raise BudgetError(f"{operator or 'nothing'} stands where <= should: {why}; {example}")
    if value.startswith("-"):
        raise BudgetError(f"{value} is negative; {example}")
    read = _VALUE.fullmatch(value)
    if not read:
        raise BudgetError(f"{value!r} is no amount; {example}")
    number, unit = Decimal(read["number"]), read["unit"].replace("µ", "u").replace("μ", "u").replace("×", "x").lower()
    if unit == "%":
        return Limit(metric, float(number / 100), "share")
    if unit == "x":
        return Limit(metric, float(number), "factor")
    scales = {name.lower(): Decimal(scale) for name, scale in METRICS[metric].units.items()}
    if unit not in scales:
        problem = f"{read['unit']!r} is no unit of {metric}" if unit else f"{value} has no unit"
        raise BudgetError(f"{problem} ({', '.join(filter(None, METRICS[metric].units))}); {example}")
    if not unit and number != number.to_integral_value():
        raise BudgetError(f"{value} is no whole number of {metric}; {example}")
    return Limit(metric, float(number * scales[unit]), "absolute")


def _row(limit: Limit, before: Facts, after: Facts) -> Row:
    """Judge one limit."""
    first, last = (_number(getattr(facts, METRICS[limit.metric].fact)) for facts in (before, after))
    # An absolute limit needs no original; a drop always does.
    original = 0.0 if first is None and limit.form == "absolute" and limit.metric != "drop" else first
    if original is None or last is None:
        missing = " and ".join(name for name, value in (("before", original), ("after", last)) if value is None)
        reason = f"{'score' if limit.metric == 'drop' else limit.metric} was not measured {missing}"
        allowed = None if original is None else limit.allowed(original)
        return Row(limit.metric, str(limit), allowed, first, None, met=False, gap=None, reason=reason)
    allowed = limit.allowed(original)
    if limit.metric == "drop":
        last = original - last if before.higher_is_better else last - original
        gap, tie = last - allowed, _TIE * max(1.0, abs(original))
    else:
        gap, tie = (last / allowed - 1 if allowed else math.inf if last else 0.0), _TIE
    gap = 0.0 if abs(gap) <= tie else gap
    return Row(limit.metric, str(limit), allowed, first, last, met=gap <= 0, gap=gap)


def _number(fact: float | None) -> float | None:
    """Return a fact as a number, or None where it is missing or not finite."""
    if fact is None or not math.isfinite(fact):
        return None
    return fact if isinstance(fact, int) else float(fact)  # NumPy scalars are no JSON


def _plain(number: Decimal) -> str:
    """Return `1e+2` as `100` and `2.50` as `2.5`."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
