"""The report on a terminal: what counts, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from featherweight.report.facts import Report
from featherweight.report.figures import comparison, limits, remarks, sentence
from featherweight.report.wording import amount, clean, duration, number, percent, shorten

_STYLES = {"met": "green", "missed": "bold red", "unknown": "yellow"}
_MOST_PARTS, _MOST_UNTOUCHED = 6, 8


def summary(report: Report) -> Group:
    """Return the report for `rich.print`, readable at 80 columns; parts of it that are missing are left out."""
    style = "bold" if not report.verdict.get("rows") else "bold green" if report.verdict.get("met") else "bold red"
    blocks: list[RenderableType] = [Text(f"{clean(report.task)}: {sentence(report)}", style=style)]
    for title, block in (
        ("Budget", _limits(report)),
        ("Before and after", _comparison(report)),
        ("Steps", _steps(report)),
        ("Bytes of the file", _parts(report)),
        ("Left untouched", _untouched(report)),
        ("Search", _trials(report)),
        ("Remarks", _lines(remarks(report))),
    ):
        if block is not None:
            blocks += [Text(), Text(title, style="bold"), block]
    return Group(*blocks)


def _table(*headers: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for position, header in enumerate(headers):
        words = position == 0 or header in left
        table.add_column(header, justify="left" if words else "right", overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    # Always as Text: rich would read a path such as layer[3] as its markup.
    table.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in cells))


def _lines(lines: Iterable[str]) -> Table | None:
    table = Table.grid(padding=(0, 1, 0, 0))
    for line in lines:
        _add(table, "-", line)
    return table if table.row_count else None


def _limits(report: Report) -> Table | None:
    table = _table("limit", "before", "after", "allowed", "verdict", left=("verdict",))
    for line in limits(report):
        word = {"met": "met", "missed": "MISSED", "unknown": "UNKNOWN"}[line.state]
        verdict = Text(f"{word}, {line.gap}", style=_STYLES[line.state])
        _add(table, line.limit, line.before, line.after, line.allowed, verdict)
    return table if table.row_count else None


def _comparison(report: Report) -> Table | None:
    table = _table("", "before", "after", "change", left=("change",))
    for row in comparison(report):
        _add(table, row.metric, row.before, row.after, row.change)
    return table if table.row_count else None


def _steps(report: Report) -> Group | None:
    table = _table("step", "score", "size", "latency", "macs", "took")
    notes = []
    for row in report.steps:
        name = shorten(row.get("step", ""), 32)
        taken = "" if row is report.steps[0] else duration(row.get("seconds"))
        costs = [
            "-" if row.get(key) is None else amount(metric, row[key])
            for metric, key in (("size", "size_bytes"), ("latency", "latency_seconds"), ("macs", "macs"))
        ]
        _add(table, name, "-" if row.get("score") is None else number(row["score"]), *costs, taken)
        notes += [f"{name}: {row['note']}"] if row.get("note") else []
    said = _lines(notes)
    return Group(table, *([said] if said else [])) if table.row_count else None


def _parts(report: Report) -> Table | None:
    table = _table("part", "bytes", "share")
    total = sum(report.parts.values())
    ordered = sorted(report.parts.items(), key=lambda item: -item[1])
    rest = ordered[_MOST_PARTS:]
    if len(rest) > 1:
        ordered = [*ordered[:_MOST_PARTS], (f"{len(rest)} smaller parts", sum(size for _, size in rest))]
    for name, size in ordered:
        _add(table, shorten(name, 50, 0.6), f"{size:,}", percent(size / total) if total else "")
    return table if table.row_count else None


def _untouched(report: Report) -> Table | None:
    lines = [
        f"{row.get('path', '')} ({row.get('step', '')}): {row.get('reason', '')}"
        for row in report.untouched[:_MOST_UNTOUCHED]
    ]
    if (more := len(report.untouched) - len(lines)) > 0:
        lines.append(f"and {more} more, {len(report.untouched)} in all; the HTML report lists each")
    return _lines(lines)


def _trials(report: Report) -> Text | None:
    if not report.trials:
        return None
    met = [trial for trial in report.trials if trial.get("met")]
    words = f"{len(report.trials)} trials, {len(met)} within the budget"
    sized = [trial for trial in met if trial.get("size_bytes") is not None]
    if sized:
        best = min(sized, key=lambda trial: int(trial["size_bytes"]))
        words += (
            f"; the smallest of them {amount('size', best['size_bytes'])} at a score of {number(best.get('score'))}"
        )
    return Text(f"{words}; {duration(sum(trial.get('seconds') or 0 for trial in report.trials))}")
