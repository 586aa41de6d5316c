"""What every command shares: the options that several have, progress on standard error, facts on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from featherweight.data import Task

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A built-in name (see [b]list tasks[/b]) or [b]path/to/file.py:function[/b] that returns a Task.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
FileName = Annotated[Path, typer.Argument(metavar="MODEL.fw", help="A compressed model.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw: one seed gives one file, byte for byte.")]
Processes = Annotated[int, typer.Option("--workers", min=1, help="Processes of this machine, each on one thread.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray", help="Address of a Ray cluster, as [b]ray start[/b] prints it.")
]
Cpus = Annotated[float, typer.Option(help="CPUs that one piece of work takes of the cluster.")]
Gpus = Annotated[float, typer.Option(help="GPUs that one piece of work takes of the cluster.")]
screen = Console(stderr=True)


@contextmanager
def showing(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show messages with a bar and the time left, on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as progress:
        bar = progress.add_task("starting", total=1.0)
        label = ""

        def told(message: str, done: float) -> None:
            nonlocal label
            if message.partition(": epoch")[0] != label:
                label = message.partition(": epoch")[0]
                progress.reset(bar, total=1.0)
                if not quiet and not screen.is_terminal:
                    screen.print(label, markup=False, highlight=False)
            progress.update(bar, description=message[:100].replace("[", "("), completed=done)

        yield told


@contextmanager
def loaded(task: str, quiet: bool) -> Iterator[tuple[Task, Callable[[str, float], None]]]:
    """Find a task, and give it together with what shows messages about the work on it."""
    from featherweight.tasks import find_task

    with showing(quiet) as progress:
        progress(f"loading {task}", 0.0)
        yield find_task(task), progress


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def show(facts: dict[str, Any], title: str, as_json: bool) -> None:
    """Print facts as a table under a title, or as one JSON object."""
    if as_json:
        emit(facts)
        return
    table = Table(title=title, show_header=False)
    table.add_column("fact", style="bold")
    table.add_column("value", overflow="fold")
    for key, value in facts.items():
        shown = (
            json.dumps(value, indent=1)
            if isinstance(value, dict | list)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )
        table.add_row(key, escape(shown))
    Console().print(table)
