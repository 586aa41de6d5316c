"""The report as one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from featherweight.errors import ArtifactError
from featherweight.report.charts import charts, check_available
from featherweight.report.facts import Report
from featherweight.report.figures import comparison, headline, limits, original_bytes, remarks, score_name, sentence
from featherweight.report.wording import amount, clean, digits, duration, factor, number, percent, ratio

__all__ = ["check_available", "render_html", "write_html"]


def write_html(report: Report, path: str | Path) -> int:
    """Write the page, all or nothing, and return its length in bytes.

    Args:
        report: the facts; parts of it that are missing are left out of the page.
        path: the file, replaced where it exists.

    Raises:
        ExportError: a package of the extra `report` is not installed; `check_available` tells so beforehand.
        ArtifactError: the path cannot be written.
    """
    path = Path(path)
    data = render_html(report).encode()
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True) if part.is_file() else None
        raise ArtifactError(f"the report {path} cannot be written: {error.strerror or error}") from error
    return len(data)


def render_html(report: Report) -> str:
    """Return the page.

    Raises:
        ExportError: a package of the extra `report` is not installed.
    """
    # Altair escapes what stands in a drawing, so that and nothing else is marked as safe.
    drawings = [(chart, Markup(chart.svg)) for chart in charts(report)]  # noqa: S704
    page = environment().get_template("report.html.j2")
    return page.render(
        report=report,
        sentence=sentence(report),
        figures=headline(report),
        limits=limits(report),
        comparison=comparison(report),
        remarks=remarks(report),
        score_name=score_name(report),
        original_bytes=original_bytes(report),
        drawings=drawings,
        parts=sorted(report.parts.items(), key=lambda item: -item[1]),
        total=sum(report.parts.values()),
        machine={key: _listed(value) for key, value in report.machine.items()},
    )


def environment() -> Environment:
    """Return what renders the pages: every text escaped, nothing undefined."""
    environment = Environment(
        loader=PackageLoader("featherweight.report", ""),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words: dict[str, Callable[..., str]] = {
        "amount": lambda value, metric: "" if value is None else amount(metric, value),
        "number": lambda value: "" if value is None else number(value),
        "digits": lambda value: "" if value is None else digits(value),
        "duration": lambda value: "" if value is None else duration(value),
        "factor": lambda value: "" if value is None else factor(value),
        "share": lambda value, whole: percent(value / whole) if whole and value is not None else "",
        "smaller": lambda value, first: factor(size) if (size := ratio(first, value)) else "",
    }
    environment.filters.update(words)
    return environment


def _shown(value: Any) -> Any:
    """Return a value of the template as the page shows it; names come from strangers."""
    if value is None:
        return ""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _listed(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list | tuple) else str(value)
