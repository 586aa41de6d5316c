"""The charts of a comparison: Pareto fronts whose points lead to their rows, one small chart a recipe, intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.errors import need
from featherweight.report.charts import ACCENT, BYTES_AXIS, GOOD, INK, MUTED, PURPOSE, TRACK, WIDTH, Chart, as_svg
from featherweight.report.compared import Comparison
from featherweight.report.wording import amount, number, shorten

DOUBT, BAD = "#8a5a00", "#b3261e"
KINDS = {
    "baseline": (MUTED, "cross"),
    "technique": (ACCENT, "circle"),
    "combination": (GOOD, "square"),
    "file": (DOUBT, "triangle-up"),
    "search": (BAD, "diamond"),
}
_ROOM = 1.5  # between the costs of two marks that are named
_DEEPEST = 0.2  # of a share that was lost; what lost more is drawn at the border
_AXES = {
    "bytes": ("file size, logarithmic", BYTES_AXIS),
    "milliseconds": ("milliseconds a call on ONNX Runtime, logarithmic", ""),
}


def anchor(row: Mapping[str, Any]) -> str:
    """Return the identifier of a ranking row in the page."""
    return "row-" + re.sub(r"[^a-zA-Z0-9]+", "-", f"{row['recipe']} {row['budget']}")


def places(comparison: Comparison) -> dict[str, int]:
    """Return the number of each recipe, by which the page shows and hides its marks."""
    return {contender["name"]: place for place, contender in enumerate(comparison.contenders)}


def fronts(comparison: Comparison) -> list[Chart]:
    """Return score against bytes and against milliseconds, each with its Pareto front; none without finished cells.

    Raises:
        ExportError: a package of the extra `report` is not installed.
    """
    return [_front(comparison, cost) for cost in _AXES if comparison.ranking]


def pareto(rows: Sequence[Mapping[str, Any]], cost: str, higher: bool) -> list[Mapping[str, Any]]:
    """Return the rows that no other one is better than in both score and cost, by rising cost."""
    sign = 1 if higher else -1
    front: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[cost], -sign * row["score"])):
        if not front or sign * row["score"] > sign * front[-1]["score"]:
            front.append(row)
    return front


def _front(comparison: Comparison, cost: str) -> Chart:
    altair: Any = need("altair", "report", PURPOSE)
    rows, higher = comparison.ranking, comparison.originals[0]["higher_is_better"]
    name = comparison.originals[0]["score_name"]
    best = pareto(rows, cost, higher)
    x, scale = _scales(altair, comparison, cost)
    y = altair.Y("y:Q", scale=scale, axis=altair.Axis(title=None, tickCount=6, grid=True))
    line = altair.Chart(altair.Data(values=_steps(best, cost)))
    layers = [
        _original(altair, comparison, y),
        line.mark_line(color=MUTED, strokeWidth=1).encode(x=x, y=y, order="place:Q"),
    ]
    for recipe, place in places(comparison).items():
        points = [_point(row, cost, higher) for row in rows if row["recipe"] == recipe]
        if points:
            layers += _marks(altair, points, place, x, y)
    named = [{**_point(row, cost, higher), "text": shorten(row["recipe"], 22)} for row in _apart(best, cost)]
    layers.append(
        altair.Chart(altair.Data(values=named))
        .mark_text(align="left", dx=7, dy=9, fontSize=11, color=INK)
        .encode(x=x, y=y, text="text:N")
    )
    what = "size" if cost == "bytes" else "time"
    title = f"{name.capitalize()} against {what}"
    told = "; ".join(f"{row['recipe']} {_cost(cost, row[cost])}: {number(row['score'])}" for row in best)
    drawing = altair.layer(*layers).properties(width=WIDTH - 50, height=300)
    caption = (
        "Each mark is one recipe at one budget, the mean over the seeds; the rule through it is the 95 % interval, the line "
        "joins those that none is better than in both. Dashed: the original. A mark leads to its row."
    )
    return Chart(title, f"{title}. On the front: {told}.", caption, as_svg(drawing, links=True))


def _scales(altair: Any, comparison: Comparison, cost: str) -> tuple[Any, Any]:
    title, label = _AXES[cost]
    axis = {"tickCount": 5, "grid": True, "labelOverlap": True}
    labels = {"labelExpr": label} if label else {}
    x = altair.X(
        "x:Q",
        scale=altair.Scale(type="log", nice=False, padding=16),
        axis=altair.Axis(title=title, **labels, **axis),
    )
    scores = [row["score"] for row in comparison.ranking] + [one["score"] for one in comparison.originals]
    low, high = min(scores), max(scores)
    if comparison.originals[0]["higher_is_better"] and low >= 0 and high <= 1:
        low = max(low, high - _DEEPEST)
    room = 0.04 * (high - low or 1.0)
    domain = altair.Scale(domain=[low - room, high + room], clamp=True, nice=False)
    return x, domain


def _original(altair: Any, comparison: Comparison, y: Any) -> Any:
    score = sum(one["score"] for one in comparison.originals) / len(comparison.originals)
    return altair.Chart(altair.Data(values=[{"y": score}])).mark_rule(strokeDash=[4, 4], color=MUTED).encode(y=y)


def _point(row: Mapping[str, Any], cost: str, higher: bool) -> dict[str, Any]:
    sign = 1 if higher else -1
    ends = [row["score"] + sign * (row["drop"] - row[end]) for end in ("drop_high", "drop_low")]
    what = f"{amount('size', round(row['bytes']))}, {row['milliseconds']:.3g} ms"
    told = f"{row['recipe']} at {row['budget']}: {number(row['score'])}, {what}"
    return {
        "x": row[cost],
        "y": row["score"],
        "low": min(ends),
        "high": max(ends),
        "told": told,
        "link": "#" + anchor(row),
        "kind": row["kind"],
    }


def _marks(altair: Any, points: list[dict[str, Any]], place: int, x: Any, y: Any) -> list[Any]:
    """Return the intervals and the marks of one recipe, named so that the page can show and hide them."""
    color, shape = KINDS[points[0]["kind"]]
    data = altair.Data(values=points)
    # Lines of two points: of a rule from y to y2 Vega would take the second end into the scale, and zero with it.
    ends = [{"x": point["x"], "y": point[end], "link": point["link"]} for point in points for end in ("low", "high")]
    whiskers = altair.Chart(altair.Data(values=ends), name=f"w{place}").mark_line(
        color=color, opacity=0.5, strokeWidth=1
    )
    marks = altair.Chart(data, name=f"c{place}").mark_point(filled=True, opacity=1, size=70, shape=shape, color=color)
    return [
        whiskers.encode(x=x, y=y, detail="link:N"),
        marks.encode(x=x, y=y, href="link:N", description="told:N"),
    ]


def _steps(front: Sequence[Mapping[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The corners of the front's stairs: what a budget between two of its points gives is the smaller one."""
    corners: list[tuple[float, float]] = []
    for row in front:
        if corners:
            corners.append((row[cost], corners[-1][1]))
        corners.append((row[cost], row["score"]))
    return [{"x": x, "y": y, "place": place} for place, (x, y) in enumerate(corners)]


def _apart(front: Sequence[Mapping[str, Any]], cost: str) -> list[Mapping[str, Any]]:
    """The first mark of each recipe on the front, and of those only such as have room for a name."""
    kept: list[Mapping[str, Any]] = []
    for row in front:
        named = any(row["recipe"] == other["recipe"] for other in kept)
        if not named and all(row[cost] / other[cost] > _ROOM for other in kept):
            kept.append(row)
    return kept


def _cost(cost: str, value: float) -> str:
    return amount("size", round(value)) if cost == "bytes" else f"{value:.3g} ms"


def multiples(comparison: Comparison) -> list[Chart]:
    """Return one small chart a recipe: its scores against bytes, before those of all others in grey."""
    altair: Any = need("altair", "report", PURPOSE)
    higher = comparison.originals[0]["higher_is_better"] if comparison.originals else True
    every = [_point(row, "bytes", higher) for row in comparison.ranking]
    charts = []
    for contender in comparison.contenders:
        rows = [row for row in comparison.ranking if row["recipe"] == contender["name"]]
        if not rows:
            continue
        x, scale = _scales(altair, comparison, "bytes")
        x = x.axis(title=None, tickCount=3, labelExpr=BYTES_AXIS, labelOverlap=True)
        y = altair.Y("y:Q", scale=scale, axis=altair.Axis(title=None, tickCount=3))
        color, shape = KINDS[contender["kind"]]
        own = altair.Data(values=sorted((_point(row, "bytes", higher) for row in rows), key=lambda point: point["x"]))
        drawing = altair.layer(
            altair.Chart(altair.Data(values=every))
            .mark_point(filled=True, size=14, color=TRACK, opacity=1)
            .encode(x=x, y=y),
            _original(altair, comparison, y),
            altair.Chart(own).mark_line(color=color, strokeWidth=1).encode(x=x, y=y),
            altair.Chart(own).mark_point(filled=True, opacity=1, size=50, shape=shape, color=color).encode(x=x, y=y),
        ).properties(width=170, height=110)
        told = "; ".join(f"{amount('size', round(row['bytes']))}: {number(row['score'])}" for row in rows)
        charts.append(Chart(contender["name"], f"{contender['name']}. {told}.", contender["about"], as_svg(drawing)))
    return charts


def intervals(comparison: Comparison) -> list[Chart]:
    """Return one chart a budget: what each recipe loses, with its 95 % interval, the best first."""
    charts = []
    for budget in dict.fromkeys(row["budget"] for row in comparison.ranking):
        rows = [row for row in comparison.ranking if row["budget"] == budget]
        if len(rows) > 1:
            charts.append(_interval(comparison, budget, rows))
    return charts


def _interval(comparison: Comparison, budget: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    altair: Any = need("altair", "report", PURPOSE)
    shares = all(row["share"] for row in rows)
    scale, unit = (100, "points") if shares else (1, comparison.originals[0]["score_name"])
    ends = {"drop": "drop", "low": "drop_low", "high": "drop_high"}
    points = [
        {"name": shorten(row["recipe"], 24), "color": KINDS[row["kind"]][0]}
        | {name: scale * row[key] for name, key in ends.items()}
        for row in rows
    ]
    most = max(point["high"] for point in points)
    if shares:
        most = min(most, max(100 * _DEEPEST, 3 * points[0]["high"]))
    domain = altair.Scale(domain=[min(0, *(point["low"] for point in points)), most], clamp=True)
    names = altair.Axis(title=None, labelLimit=170, ticks=False, domain=False)
    base = altair.Chart(altair.Data(values=points)).encode(
        y=altair.Y("name:N", sort=None, axis=names), color=altair.Color("color:N", scale=None)
    )
    low = altair.X("low:Q", scale=domain, axis=altair.Axis(title=f"{unit} lost", tickCount=5))
    zero = altair.Chart(altair.Data(values=[{"x": 0}])).mark_rule(strokeDash=[4, 4], color=MUTED)
    drawing = altair.layer(
        base.mark_rule().encode(x=low, x2="high:Q"),
        base.mark_point(filled=True, opacity=1, size=50).encode(x=altair.X("drop:Q", scale=domain)),
        zero.encode(x=altair.X("x:Q", scale=domain)),
    ).properties(width=WIDTH - 150, height=22 * len(rows))
    told = "; ".join(f"{one['name']} {one['drop']:.3g} ({one['low']:.3g} to {one['high']:.3g})" for one in points)
    caption = f"{unit.capitalize()} lost on the test data, and the 95 % interval over seeds and samples."
    return Chart(f"Lost at {budget}", f"Lost at {budget}. {told}.", caption, as_svg(drawing))
