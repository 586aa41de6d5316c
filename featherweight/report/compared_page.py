"""A comparison as one HTML file without scripts: what is interactive are links, form controls and style rules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from featherweight.errors import ArtifactError, need
from featherweight.report.charts import PURPOSE, Chart
from featherweight.report.compared import Comparison
from featherweight.report.fronts import KINDS, anchor, fronts, intervals, multiples, places
from featherweight.report.heat import heats
from featherweight.report.html import environment
from featherweight.report.wording import clean, percent

_SCALE = 2.0  # of the PNG stills: sharp in print


def write_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `report.html`, and its charts as SVG and PNG in `stills/`; return what was written.

    Args:
        comparison: the facts.
        folder: of the comparison; files in it are replaced.

    Raises:
        ExportError: a package of the extra `report` is not installed.
        ArtifactError: the folder cannot be written.
    """
    folder = Path(folder)
    drawn = {"fronts": fronts(comparison), "intervals": intervals(comparison), "multiples": multiples(comparison)}
    page = folder / "report.html"
    try:
        (folder / "stills").mkdir(parents=True, exist_ok=True)
        part = page.with_suffix(".part")
        part.write_text(render_comparison(comparison, drawn), encoding="utf-8")
        os.replace(part, page)
        written = [_still(folder, place, chart) for place, chart in enumerate(drawn["fronts"] + drawn["intervals"])]
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from error
    return [page, *(path for pair in written for path in pair)]


def _still(folder: Path, place: int, chart: Chart) -> tuple[Path, Path]:
    convert: Any = need("vl_convert", "report", PURPOSE)
    name = "".join(c if c.isalnum() else "-" for c in chart.title.lower())
    svg, png = (folder / "stills" / f"{place + 1}-{name}{ending}" for ending in (".svg", ".png"))
    svg.write_text(chart.svg, encoding="utf-8")
    png.write_bytes(convert.svg_to_png(chart.svg, scale=_SCALE))
    return svg, png


def render_comparison(comparison: Comparison, drawn: Mapping[str, list[Chart]]) -> str:
    """Return the page.

    Args:
        comparison: the facts.
        drawn: charts by section: `fronts`, `intervals` and `multiples`.
    """
    # Altair escapes what stands in a drawing, so that and nothing else is marked as safe.
    drawings = {name: [(chart, Markup(chart.svg)) for chart in charts] for name, charts in drawn.items()}  # noqa: S704
    shares = [row["share"] for row in comparison.ranking]
    return (
        environment()
        .get_template("compared.html.j2")
        .render(
            made=comparison,
            drawings=drawings,
            places=places(comparison),
            colors={kind: color for kind, (color, _) in KINDS.items()},
            anchors=[anchor(row) for row in comparison.ranking],
            heats=heats(comparison),
            lost=_lost if shares and all(shares) else _plainly,
            percent=percent,
            failed=[row for row in comparison.rows if row["status"] != "done"],
            protocol={clean(key): _listed(value) for key, value in comparison.protocol.items()},
            machine={clean(key): _listed(value) for key, value in comparison.machine.items()},
        )
    )


def _lost(drop: float) -> str:
    return f"{100 * drop:.2f}"


def _plainly(drop: float) -> str:
    return f"{drop:.3g}"


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else clean(json.dumps(value).strip('"'))
