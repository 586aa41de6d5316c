"""`featherweight compress` and `featherweight plan`: a budget kept, and what it would ask."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from featherweight.commands.console import AsJson, Seed, TaskName, emit, loaded, show

DeviceCommand = Annotated[
    str | None,
    typer.Option(
        help="Keeps the latency limit on another machine: times the exported file {model} there, with the inputs in the .npz "
        "file {inputs}, and prints the seconds of one call. Such as [b]'sh time_on_board.sh {model} {inputs}'[/b]."
    ),
]


def compress(
    task: TaskName,
    budget: Annotated[
        str,
        typer.Option(help="Limits, such as [b]'size<=2%, drop<=1pt'[/b]: size, params, macs, latency, memory, drop."),
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of steps; without it the mix for the budget is searched.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("model.fw"),
    report: Annotated[Path | None, typer.Option(help="Write an HTML report there.")] = None,
    seed: Seed = 0,
    trials: Annotated[int, typer.Option(min=1, help="Most candidates that the search trains.")] = 12,
    epochs: Annotated[
        int | None, typer.Option(min=2, help="Most of one candidate's training; by default what its size allows.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed run from OUT.run/.")] = False,
    latency_table: Annotated[
        Path | None, typer.Option(help="JSON file of measured seconds to read and extend.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="Whose latency the budget means: onnxruntime, openvino or openvino_bf16.")
    ] = "onnxruntime",
    device_command: DeviceCommand = None,
    as_json: AsJson = False,
) -> None:
    """Compress a task's model until it keeps a budget, and write one file that runs by itself.

    Example: featherweight compress digits --budget "size<=2%, drop<=1pt" --report report.html
    """
    from featherweight.budget import Budget
    from featherweight.pipeline import compress as compress_model
    from featherweight.preflight import find_clock, find_clocked, find_device, writable
    from featherweight.recipe_files import load_recipe
    from featherweight.techniques import together

    limits = Budget.parse(budget)  # first what is refused in a moment: a built-in task may train for minutes
    steps = load_recipe(recipe) if recipe is not None else None
    find_device(device)
    find_clocked(runtime)
    find_clock(device_command, runtime, limits)
    writable(out)
    if report is not None:
        from featherweight.report.html import check_available, write_html

        writable(report, "report.html")
        check_available()
    with loaded(task, as_json or not together.first()) as (found, progress):
        artifact = compress_model(
            found.model,
            found.data,
            limits,
            steps,
            trials=trials,
            epochs=epochs,
            seed=seed,
            device=device,
            out=out,
            resume=resume,
            latency_table=latency_table,
            runtime=runtime,
            device_command=device_command,
            name=found.name if found.name != "task" else task,
            command=shlex.join(["featherweight", *sys.argv[1:]]),
            progress=progress,
        )
    if not together.first():
        raise typer.Exit(0)
    made = artifact.report
    if report is not None:
        write_html(made, report)
    if as_json:
        emit(_compress_facts(made, out))
    else:
        from featherweight.report.terminal import summary

        Console().print(summary(made))
    raise typer.Exit(0 if made.verdict["met"] else 2)


def _compress_facts(made: Any, out: Path) -> dict[str, Any]:
    before, after = made.before, made.after
    return {
        "file": str(out),
        "file_bytes": after["size_bytes"],
        "original_bytes": before["size_bytes"],
        "parameters": after["params"],
        "nonzero": after["nonzero"],
        "macs": after["macs"],
        "score_before": before["score"],
        "score_after": after["score"],
        "latency": {"before": before["latency"], "after": after["latency"]},
        "peak_bytes": {"before": before["peak_bytes"], "after": after["peak_bytes"]},
        "agreement": made.agreement,
        "verdict": made.verdict,
        "recipe": made.recipe,
        "untouched": made.untouched,
        "steps": made.steps,
        "trials": made.trials,
        "seed": made.seed,
        "notes": made.notes,
    }


def plan(
    task: TaskName,
    budget: Annotated[str, typer.Option(help="Limits, such as [b]'size<=2%, drop<=1pt'[/b].")],
    trials: Annotated[int, typer.Option(min=1, help="Most candidates that compress would train.")] = 12,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    device_command: DeviceCommand = None,
    as_json: AsJson = False,
) -> None:
    """Say what a budget asks of a task's model, whether it is within reach, and how long it would take. Exit code 2: it is not.

    Example: featherweight plan digits --budget "size<=2%, drop<=1pt"
    """
    from featherweight.budget import Budget
    from featherweight.latency import DEFAULT
    from featherweight.planning import plan as plan_model
    from featherweight.preflight import find_clock

    limits = Budget.parse(budget)
    find_clock(device_command, DEFAULT, limits)
    with loaded(task, as_json) as (found, progress):
        facts = plan_model(found.model, found.data, limits, trials, seed, device, progress, device_command)
    show(facts, f"{task}: {limits}", as_json)
    raise typer.Exit(0 if facts["feasible"] else 2)
