"""The figures of a report in words: what the terminal and the page both say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from featherweight.device_command import DEVICE
from featherweight.report.facts import Report
from featherweight.report.wording import amount, clean, digits, number, percent, points, spread, times


class Figure(NamedTuple):
    """One headline figure: `76.9x`, `smaller`, `1.72 MB to 22,411 B`."""

    value: str
    label: str
    detail: str


class Line(NamedTuple):
    """One limit of the budget; `state` is `met`, `missed` or `unknown`, `gap` says by how much."""

    limit: str
    before: str
    after: str
    allowed: str
    state: str
    gap: str
    binding: bool


class Change(NamedTuple):
    """One row of the comparison of the original with the delivered file."""

    metric: str
    before: str
    after: str
    change: str


def latency(measurement: Mapping[str, Any], runtime: str = "") -> float | None:
    """Return the median seconds on a runtime, or on the one that the budget means."""
    timed = measurement.get("latency", {}).get(runtime or measurement.get("runtime", ""))
    return timed["median"] if timed else None


def drop(report: Report) -> float | None:
    """Return the score lost, in units of the score; negative when it got better."""
    first, last = report.before.get("score"), report.after.get("score")
    if first is None or last is None:
        return None
    return float(first - last if report.after.get("higher_is_better", True) else last - first)


def lost(report: Report) -> tuple[str, str]:
    """Return the change of the score as an amount and a word: `("0.32 pt", "lost")`; two empty texts if unknown."""
    change = drop(report)
    if change is None:
        return "", ""
    # Points are hundredths: they mean something for a share, and nothing for a perplexity.
    share = all(0 <= score <= 1 for score in (report.before["score"], report.after["score"]))
    text = points(abs(change)) if share else f"{abs(change):.3g}"
    return text, "lost" if change > 1e-9 else "gained" if change < -1e-9 else "unchanged"


def original_bytes(report: Report) -> int | None:
    """Return what every step is compared with: the original's size, or the first step's where that was not measured."""
    first = report.steps[0].get("size_bytes") if report.steps else None
    return report.before.get("size_bytes") or first


def score_name(report: Report) -> str:
    """Return what the score is called."""
    return clean(report.after.get("score_name") or report.before.get("score_name") or "score")


def sentence(report: Report) -> str:
    """Return the verdict in one sentence, the gain and its price with it."""
    size = times(report.before.get("size_bytes"), report.after.get("size_bytes"), "smaller", "larger")
    text, word = lost(report)
    price = (
        f"{score_name(report)} {word}"
        if word == "unchanged"
        else f"{text} of {score_name(report)} {word}"
        if word
        else ""
    )
    gain = ", ".join(filter(None, (size, price)))
    rows = report.verdict.get("rows", [])
    if not rows:
        return gain[:1].upper() + gain[1:] if gain else "Nothing was measured"
    if report.verdict.get("met"):
        return f"Budget met: {gain}" if gain else "Budget met"
    missed = ", ".join(str(row.get("metric")) for row in rows if not row.get("met"))
    return f"Budget missed ({clean(missed)})" + (f": {gain}" if gain else "")


def headline(report: Report) -> list[Figure]:
    """Return the three or four figures that a reader in a hurry wants."""
    before, after, figures = report.before, report.after, []

    def factor(first: float | None, last: float | None, metric: str, less: str, more: str, what: str = "") -> None:
        if words := times(first, last, less, more):
            value, _, word = words.rpartition(" ")
            detail = f"{amount(metric, first)} to {amount(metric, last)}"
            figures.append(Figure(value or "1x", f"{word if value else less}{what}", detail))

    factor(before.get("size_bytes"), after.get("size_bytes"), "size", "smaller", "larger")
    if (text := lost(report))[1]:
        value = "0" if text[1] == "unchanged" else text[0]
        label = f"of {score_name(report)} {'lost' if text[1] == 'unchanged' else text[1]}"
        figures.append(Figure(value, label, f"{number(before['score'])} to {number(after['score'])}"))
    runtime = after.get("runtime", "")
    where = " on the device" if runtime == DEVICE else ""
    factor(latency(before, runtime), latency(after, runtime), "latency", "faster", "slower", where)
    factor(before.get("macs"), after.get("macs"), "macs", "fewer", "more", " multiply-adds")
    return figures


def limits(report: Report) -> list[Line]:
    """Return one line a limit of the budget."""
    lines = []
    for row in report.verdict.get("rows", []):
        metric, gap, met = str(row.get("metric", "")), row.get("gap"), bool(row.get("met"))
        if gap is None:
            words = clean(row.get("reason") or "nothing was allowed")
            state = "unknown" if row.get("reason") else "missed"
        else:
            distance = points(abs(gap)) if metric == "drop" else percent(abs(gap))
            words = f"{distance} {'to spare' if met else 'over'}" if gap else "exactly at the limit"
            state = "met" if met else "missed"
        before = number(row.get("before")) if metric == "drop" else amount(metric, row.get("before"))
        value = row.get("after")
        after = points(value) if metric == "drop" and value is not None else amount(metric, value)
        binding = report.verdict.get("binding") == metric
        text = clean(row.get("limit_text") or metric)
        lines.append(Line(text, before, after, amount(metric, row.get("allowed")), state, words, binding))
    return lines


def comparison(report: Report) -> list[Change]:
    """Return the rows that compare the original with the delivered file; what neither side measured is left out."""
    before, after = report.before, report.after
    rows = []

    def compare(label: str, metric: str, key: str, less: str, more: str) -> None:
        first, last = before.get(key), after.get(key)
        if first is not None or last is not None:
            rows.append(Change(label, amount(metric, first), amount(metric, last), times(first, last, less, more)))

    compare("file size", "size", "size_bytes", "smaller", "larger")
    if before.get("score") is not None or after.get("score") is not None:
        rows.append(Change(score_name(report), _scored(before), _scored(after), " ".join(lost(report)).strip()))
    compare("parameters", "params", "params", "fewer", "more")
    compare("non-zero parameters", "params", "nonzero", "fewer", "more")
    compare("multiply-adds", "macs", "macs", "fewer", "more")
    timed = [side.get("latency", {}) for side in (before, after)]
    for runtime in sorted({name for side in timed for name in side}):
        first, last = (latency(side, runtime) for side in (before, after))
        before_text, after_text = (spread(side.get(runtime)) for side in timed)
        change = times(first, last, "faster", "slower")
        rows.append(Change(f"latency, {clean(runtime)}", before_text, after_text, change))
    compare("peak memory", "memory", "peak_bytes", "smaller", "larger")
    return rows


def _scored(measurement: Mapping[str, Any]) -> str:
    error = measurement.get("score_error")
    known = error is not None and measurement.get("score") is not None
    return number(measurement.get("score")) + (f" ± {error:.2g}" if known else "")


def remarks(report: Report) -> list[str]:
    """Return what a reader of the figures must also know: agreement, uncounted operators, and the notes."""
    said = []
    if report.agreement:
        largest, sqnr, top = (report.agreement.get(key) for key in ("max_abs", "sqnr_db", "top1"))
        same = "" if top is None else f", same first choice for {100 * top:.4g} % of the samples"
        facts = f"largest difference {digits(largest)}, SQNR {digits(sqnr)} dB{same}"
        said.append(f"The file on ONNX Runtime agrees with the PyTorch model it was made from: {facts}.")
    for name, side in (("original", report.before), ("compressed model", report.after)):
        if counts := side.get("uncounted"):
            listed = ", ".join(f"{clean(operator)} ({count}x)" for operator, count in counts.items())
            said.append(f"Not counted in the multiply-adds of the {name}: {listed}.")
    return said + [clean(note) for note in report.notes]
