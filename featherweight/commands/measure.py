"""`featherweight measure` and `featherweight analyze`: what a model costs, and what each treatment of it would."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from featherweight.commands.console import AsJson, TaskName, emit, loaded, show


def measure(
    subject: Annotated[str, typer.Argument(metavar="TASK|MODEL.fw", help="What to measure.")],
    task: Annotated[str | None, typer.Option(help="For a file: the task whose test data gives the score.")] = None,
    runtime: Annotated[
        str,
        typer.Option(
            help="For a file: where it runs, or [b]auto[/b] for the fastest installed; see [b]list runtimes[/b]."
        ),
    ] = "onnxruntime",
    as_json: AsJson = False,
) -> None:
    """Measure a task's original model, or a file: bytes, parameters, MACs, latency, and the score."""
    from featherweight.inspection import measure_file, measure_task
    from featherweight.tasks import find_task

    if subject.endswith(".fw"):
        facts = measure_file(Path(subject), find_task(task) if task is not None else None, runtime)
    else:
        found = find_task(subject)
        facts = measure_task(found.model, found.data)
    show(facts, subject, as_json)


def analyze(task: TaskName, as_json: AsJson = False) -> None:
    """Print the damage and cost tables: what each way to store a weight loses, in nats of the output, and takes, in bytes.

    Damage is measured on calibration data without labels, one weight at a time.
    """
    from featherweight.inspection import analyze_task

    with loaded(task, as_json) as (found, progress):
        tables = analyze_task(found.model, found.data, progress)
    if as_json:
        emit(tables.to_json())
        return
    from featherweight.report.damages import damage_tables

    for table in damage_tables(tables):
        Console().print(table)
