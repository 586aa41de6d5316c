"""`featherweight compare`: techniques on a task by the same rules."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from featherweight.commands.console import AsJson, Cpus, Gpus, Processes, RayAddress, TaskName, emit, showing


def compare(
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder of cells, tables and report; continued where it exists.")],
    recipes: Annotated[
        str, typer.Option(help="[b]all[/b], or names and YAML files with commas between; baselines are always there.")
    ] = "all",
    budgets: Annotated[
        str, typer.Option(help="File sizes: [b]4x[/b], [b]10%[/b] or [b]300KB[/b], with commas.")
    ] = "2x,4x,8x,16x",
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of training, all steps of a recipe together.")] = 10,
    tries: Annotated[int, typer.Option(min=1, max=3, help="Learning rates that each recipe tries.")] = 1,
    workers: Processes = 1,
    ray: RayAddress = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    watts: Annotated[float, typer.Option(min=0.0, help="Of a busy core, where energy cannot be read.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Compare techniques on a task by the same rules: which one, for this model and this budget?

    Example: featherweight compare digits --recipes channels,bits,joint --budgets 4x,16x --seeds 1 --workers 2 --out compared
    """
    from featherweight.comparison import compare as compared
    from featherweight.workers.hiring import Crew

    with showing(as_json) as progress:
        found = compared(
            task,
            recipes,
            budgets,
            out=out,
            seeds=seeds,
            epochs=epochs,
            tries=tries,
            device=device,
            watts=watts,
            command=shlex.join(["featherweight", *sys.argv[1:]]),
            crew=Crew(workers, ray, cpus, gpus),
            progress=progress,
        )
    if as_json:
        emit({"folder": str(out), "answers": found.answers, "ranking": found.ranking})
        return
    for answer in found.answers:
        Console().print(answer["text"], markup=False, highlight=False)
