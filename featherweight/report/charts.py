"""The report's charts as SVG text: drawn by Altair, without JavaScript, in colours that the page's CSS can swap."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from featherweight.errors import need
from featherweight.report.facts import Report
from featherweight.report.figures import original_bytes, score_name
from featherweight.report.wording import amount, digits, number, shorten, times

PURPOSE = "the HTML report"
# The page's dark style selects elements by exactly these values, so they are the light theme's colours.
INK, MUTED, TRACK, ACCENT, GOOD = "#1b1f24", "#59636e", "#e6e9ed", "#2a5bd7", "#0f7a4d"
WIDTH = 400  # about a phone's, so that the text keeps its size there
_ROW_HEIGHT = 36
_CLEAR = "#ffffff00"
_MOST_ROWS = 10
_FONT = "system-ui, sans-serif"
_MARK = re.compile(
    r'<a xlink:href="[^"#]*(#[^"]+)"><path aria-label="([^"]*)" role="[^"]*" aria-roledescription="[^"]*"'
)
# What Vega says of axes and lines, which browsers read from their text anyway.
_SPOKEN = re.compile(
    r' (?:aria-label="[^"]*" )?role="graphics-[^"]*" aria-roledescription="[^"]*"(?: aria-label="[^"]*")?'
)
BYTES_AXIS = "replace(replace(format(datum.value, '~s'), 'k', 'K'), /([KMG]?)$/, ' $1B')"


class Chart(NamedTuple):
    """A chart: its title, the sentence read aloud in its place, a caption, and the SVG text."""

    title: str
    alternative: str
    caption: str
    svg: str


class _Bar(NamedTuple):
    name: str
    value: float
    label: str
    color: str = ACCENT


def check_available() -> None:
    """Import what draws the charts.

    Raises:
        ExportError: a package of the extra `report` is not installed.
    """
    need("altair", "report", PURPOSE)
    need("vl_convert", "report", PURPOSE)


def charts(report: Report) -> list[Chart]:
    """Return the charts that the facts allow, none when there are no facts.

    Raises:
        ExportError: a package of the extra `report` is not installed.
    """
    check_available()
    drawn = (_size_by_step(report), _score_by_size(report), _bytes_by_part(report), _bytes_by_layer(report))
    return [chart for chart in drawn if chart is not None]


def _size_by_step(report: Report) -> Chart | None:
    rows = [row for row in report.steps if row.get("size_bytes")]
    if len(rows) < 2:
        return None
    first = original_bytes(report)
    bars = []
    for row in rows:
        smaller = times(first, row["size_bytes"], "smaller", "larger") if row is not rows[0] else ""
        label = amount("size", row["size_bytes"]) + (f"  ·  {smaller}" if smaller else "")
        bars.append(_Bar(shorten(row.get("step", ""), 34), row["size_bytes"], label))
    return _bars("Size after each step", "The model's bytes when it is packed after that step.", bars)


def _bytes_by_part(report: Report) -> Chart | None:
    total = sum(report.parts.values())
    bars = [
        _Bar(name, size, f"{size:,} B  ·  {100 * size / total:.1f} %") for name, size in report.parts.items() if size
    ]
    if not bars:
        return None
    return _bars("Bytes by part of the file", "Where the bytes of the file are, largest first.", _largest(bars, total))


def _bytes_by_layer(report: Report) -> Chart | None:
    bars = []
    for row in report.layers:
        if size := row.get("bytes"):
            bits = "" if row.get("bits") is None else f"  ·  {digits(row['bits'])} bits"
            bars.append(_Bar(row.get("path", ""), size, f"{size:,} B{bits}"))
    if not bars:
        return None
    return _bars("Bytes by layer", "What each layer takes in the file, largest first.", _largest(bars, 0))


def _largest(bars: list[_Bar], total: int) -> list[_Bar]:
    ordered = sorted(bars, key=lambda bar: -bar.value)
    rest = ordered[_MOST_ROWS - 1 :]
    if len(rest) < 2:
        return ordered
    size = int(sum(bar.value for bar in rest))
    label = f"{size:,} B" + (f"  ·  {100 * size / total:.1f} %" if total else "")
    return [*ordered[: _MOST_ROWS - 1], _Bar(f"{len(rest)} others", size, label, MUTED)]


def _bars(title: str, caption: str, bars: Sequence[_Bar]) -> Chart:
    """Draw one bar a row, its name and value above it, where even a long name has the room."""
    altair: Any = need("altair", "report", PURPOSE)
    largest = max(bar.value for bar in bars)
    rows: list[dict[str, Any]] = [
        {**bar._asdict(), "row": row, "name": shorten(bar.name, 34, 0.6), "full": largest}
        for row, bar in enumerate(bars)
    ]
    base = altair.Chart(altair.Data(values=rows)).encode(y=altair.Y("row:O", axis=None))
    scale = altair.Scale(domain=[0, largest], nice=False)
    mark = {"height": 7, "yOffset": 9, "cornerRadius": 2}
    track = base.mark_bar(color=TRACK, **mark).encode(x=altair.X("full:Q", axis=None, scale=scale))
    value = base.mark_bar(**mark).encode(
        x=altair.X("value:Q", axis=None, scale=scale), color=altair.Color("color:N", scale=None)
    )
    name = base.mark_text(align="left", dy=-5, fontSize=13, color=INK).encode(x=altair.value(0), text="name:N")
    label = base.mark_text(align="right", dy=-5, fontSize=12, color=MUTED).encode(x=altair.value(WIDTH), text="label:N")
    spoken = "; ".join(f"{row['name']}: {row['label']}" for row in rows)
    drawing = altair.layer(track, value, name, label).properties(width=WIDTH, height=_ROW_HEIGHT * len(rows))
    return Chart(title, f"{title}. {spoken}", caption, as_svg(drawing))


def _score_by_size(report: Report) -> Chart | None:
    trials = [trial for trial in report.trials if trial.get("size_bytes") and trial.get("score") is not None]
    if not trials:
        return None
    altair: Any = need("altair", "report", PURPOSE)
    kinds = ("within the budget", "over the budget", "delivered")
    rows = [
        {"size": trial["size_bytes"], "score": trial["score"], "kind": kinds[0 if trial.get("met") else 1]}
        for trial in trials
    ]
    delivered = report.after.get("size_bytes"), _validation(report, -1)
    if delivered[0] and delivered[1] is not None:
        rows.append({"size": delivered[0], "score": delivered[1], "kind": kinds[2]})
    shown = [kind for kind in kinds if any(row["kind"] == kind for row in rows)]
    looks = dict(zip(kinds, ((ACCENT, "circle"), (MUTED, "cross"), (GOOD, "diamond")), strict=True))
    legend = altair.Legend(orient="top", title=None, symbolSize=80, columnPadding=28, labelLimit=0)

    def by_kind(channel: Any, position: int) -> Any:
        chosen = altair.Scale(domain=shown, range=[looks[kind][position] for kind in shown])
        return channel("kind:N", scale=chosen, legend=legend)

    axis = {"tickCount": 5, "grid": True}
    size = altair.X(
        "size:Q",
        scale=altair.Scale(type="log", nice=False, padding=14),
        axis=altair.Axis(title="file size, logarithmic", labelExpr=BYTES_AXIS, labelOverlap=True, **axis),
    )
    score = altair.Y("score:Q", scale=altair.Scale(zero=False, padding=12), axis=altair.Axis(title=None, **axis))
    points = [
        altair.Chart(altair.Data(values=[row for row in rows if (row["kind"] == kinds[2]) == last]))
        .mark_point(filled=True, opacity=1, size=240 if last else 60)
        .encode(x=size, y=score, color=by_kind(altair.Color, 0), shape=by_kind(altair.Shape, 1))
        for last in (False, True)
    ]
    limit_lines = _limit_lines(altair, report)
    drawing = altair.layer(*limit_lines, *points).properties(width=WIDTH - 50, height=270)
    met = sum(bool(trial.get("met")) for trial in trials)
    smallest, largest = (amount("size", pick(row["size"] for row in rows)) for pick in (min, max))
    worst, best = (number(pick(row["score"] for row in rows)) for pick in (min, max))
    spoken = (
        f"{len(trials)} trials, {met} within the budget, of {smallest} to {largest} "
        f"and a {score_name(report)} of {worst} to {best}."
    )
    dashes = " Dashed: the limits of the budget." if limit_lines else ""
    caption = f"Each point is one recipe that the search tried, scored on the validation data.{dashes}"
    title = f"{score_name(report).capitalize()} against size"
    return Chart(title, f"{title}. {spoken}", caption, as_svg(drawing))


def _validation(report: Report, position: int) -> float | None:
    """Return the score of a step, which like a trial's is on the validation data and so belongs on one axis with it."""
    measured = report.before if position == 0 else report.after
    score: float | None = report.steps[position].get("score") if report.steps else measured.get("score")
    return score


def _limit_lines(altair: Any, report: Report) -> list[Any]:
    """Draw the most bytes and the least score that the budget allows."""
    lines = []
    for row in report.verdict.get("rows", []):
        allowed, before = row.get("allowed"), _validation(report, 0)
        if allowed and row.get("metric") == "size":
            lines.append({"size": allowed})
        if allowed is not None and before is not None and row.get("metric") == "drop":
            lines.append(
                {"score": before - allowed if report.after.get("higher_is_better", True) else before + allowed}
            )
    drawn = []
    for line in lines:
        (axis,) = line
        mark = altair.Chart(altair.Data(values=[line])).mark_rule(strokeDash=[4, 4], color=MUTED)
        drawn.append(mark.encode(x="size:Q") if axis == "size" else mark.encode(y="score:Q"))
    return drawn


def as_svg(drawing: Any, links: bool = False) -> str:
    """Return an Altair drawing as SVG text in the page's colours and fonts.

    Args:
        drawing: a chart.
        links: whether its marks have a `href` within the page; their `description` is then read and shown for them.
    """
    axis = {"labelColor": MUTED, "titleColor": MUTED, "gridColor": TRACK, "domainColor": TRACK, "tickColor": TRACK}
    text = {"labelFont": _FONT, "titleFont": _FONT, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
    plain = drawing.configure(font=_FONT, background=_CLEAR, padding=0, aria=links)
    plain = plain.configure_axis(**axis, **text).configure_view(strokeWidth=0)
    plain = plain.configure_legend(labelColor=INK, labelFont=_FONT, labelFontSize=12)
    written = io.StringIO()
    plain.save(written, format="svg")
    linked = _MARK.sub(r'<a href="\1" aria-label="\2"><title>\2</title><path aria-hidden="true"', written.getvalue())
    return _SPOKEN.sub("", linked)
