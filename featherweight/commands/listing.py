"""`featherweight list`: techniques with their settings, tasks, and runtimes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from featherweight.commands.console import AsJson, emit
from featherweight.errors import RecipeError


def listing(
    what: Annotated[str, typer.Argument(metavar="techniques|tasks|runtimes", help="What to list.")] = "techniques",
    as_json: AsJson = False,
) -> None:
    """List techniques with their settings, tasks, or runtimes."""
    rows = _rows(what)
    if as_json:
        emit({what: rows})
        return
    table = Table(title=what)
    for key in rows[0]:
        longest = max(len(str(row[key])) for row in rows)
        table.add_column(key, overflow="fold", min_width=longest if key == "name" else None)  # names are copied whole
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    Console().print(table)


def _rows(what: str) -> list[dict[str, Any]]:
    if what == "tasks":
        from featherweight.tasks import TASKS

        return [{"name": name, "about": about} for name, (_, about) in TASKS.items()]
    if what == "runtimes":
        from featherweight.runtimes import available

        return available()
    if what == "techniques":
        from featherweight.recipe_files import describe_techniques

        return describe_techniques()
    raise RecipeError(f"list knows techniques, tasks and runtimes, not {what!r}")
