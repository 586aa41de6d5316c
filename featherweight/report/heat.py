"""Heat maps as tables: a shade behind each number, so that they can be read, printed and listened to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from featherweight.report.compared import Comparison

_MOST_COLUMNS = 30


class Entry(NamedTuple):
    """One number: its text, and how dark it is, 0 to 1."""

    text: str
    shade: float


class Heat(NamedTuple):
    """One map: an identifier, a caption, the columns' names, and a name with its numbers for each row."""

    id: str
    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Entry]]]


def heats(comparison: Comparison) -> list[Heat]:
    """Return what became of each layer, and of each class, at the smallest budget that half of the recipes meet."""
    cells = _cells(comparison)
    if not cells:
        return []
    layers = [layer["path"] for layer in next(iter(cells.values()))["layers"]]
    where = f"at {next(iter(cells.values()))['budget']}"
    maps = []
    if sensitive := comparison.originals[0].get("sensitivity"):
        values = [[sensitive.get(path)] for path in layers]
        caption = "How far the outputs move when one layer alone has 2-bit weights: squared error over squared output."
        maps.append(_map("sensitivity", caption, ["Sensitivity"], layers, values, "{:.2g}"))
    for key, caption, form in (
        ("kept", f"Parameters of each layer that are stored, in per cent, {where}.", "{:.0%}"),
        ("zeros", f"Zeros among the stored parameters {where}.", "{:.0%}"),
        ("bits", f"Bits of the file for each parameter that the layer had, {where}.", "{:.2g}"),
        ("rank", f"Rank of the layers that were factored, {where}.", "{:.0f}"),
    ):
        values = [[_of(row, path).get(key) for row in cells.values()] for path in layers]
        if any(value is not None for line in values for value in line):
            maps.append(_map(key, caption, list(cells), layers, values, form))
    return maps + _classes(cells, where)


def _classes(cells: Mapping[str, Mapping[str, Any]], where: str) -> list[Heat]:
    damaged = {name: row["classes"] for name, row in cells.items() if row.get("classes")}
    if not damaged or len(next(iter(damaged.values()))) > _MOST_COLUMNS:
        return []
    labels = [f"class {label}" for label in range(len(next(iter(damaged.values()))))]
    values = [[100 * value if value is not None else None for value in table] for table in damaged.values()]
    caption = f"Points lost by class {where}: compression hurts some classes more than the mean tells."
    return [_map("classes", caption, labels, list(damaged), values, "{:.3g}")]


def _cells(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """One row a recipe, of the first seed, at the smallest budget that at least half of the recipes that scale meet."""
    done = comparison.done()
    budgets = {row["budget"]: row["allowed"] for row in done if row["budget"] in comparison.protocol.get("budgets", [])}
    most = max((sum(row["budget"] == budget for row in done) for budget in budgets), default=0)
    for budget in sorted(budgets, key=lambda name: budgets[name]):
        inside = [row for row in done if row["budget"] == budget]
        if 2 * len(inside) >= most:
            return {row["recipe"]: row for row in reversed(inside)}
    return {}


def _of(row: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    return next((layer for layer in row["layers"] if layer["path"] == path), {})


def _map(
    key: str,
    caption: str,
    columns: list[str],
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    form: str,
) -> Heat:
    known = [abs(value) for line in values for value in line if value is not None]
    most = max(known, default=0.0) or 1.0
    rows = [
        (
            name,
            [Entry("", 0.0) if value is None else Entry(form.format(value), max(0.0, value) / most) for value in line],
        )
        for name, line in zip(names, values, strict=True)
    ]
    return Heat(key, caption, columns, rows)
