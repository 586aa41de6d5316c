"""The command line, a thin shell over the functions: one command each, and `search` in a file of its own."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from featherweight.errors import FeatherweightError, RecipeError
from featherweight.search_command import search

app = typer.Typer(
    name="featherweight",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make trained PyTorch models small and fast: state a budget, get one file that keeps it, and a report that proves it.",
    epilog="Exit codes: 0 the budget is met; 2 it was missed, the closest artifact is written; 1 an error.",
)
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
_screen = Console(stderr=True)
_UsageError: Any = typer.BadParameter.__base__  # the class itself lives in click or in typer, depending on the version
_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt


app.command()(search)


def main() -> None:
    """Run the command line; every error of ours is one line on standard error and exit code 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="featherweight", standalone_mode=False)
    except FeatherweightError as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        _fail(f"{error} ({notes})" if notes else str(error))
    except _UsageError as error:
        _fail(f"{error.format_message()} See featherweight {' '.join(sys.argv[1:2])} --help")
    if code == _INTERRUPTED:
        _fail("stopped; start compress again with --resume to continue")
    sys.exit(code or 0)


def _fail(message: str) -> NoReturn:
    """Say it in one line, and end with exit code 1: Typer's own 2 for a wrong option stands for a missed budget here."""
    _screen.print(f"error: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


@contextmanager
def _showing(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show messages with a bar and the time left, on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_screen, transient=True, disable=quiet or not _screen.is_terminal) as progress:
        bar = progress.add_task("starting", total=1.0)
        label = ""

        def show(message: str, done: float) -> None:
            nonlocal label
            if message.partition(": epoch")[0] != label:
                label = message.partition(": epoch")[0]
                progress.reset(bar, total=1.0)
                if not quiet and not _screen.is_terminal:
                    _screen.print(label, markup=False, highlight=False)
            progress.update(bar, description=message[:100].replace("[", "("), completed=done)

        yield show


def _emit(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


@app.command()
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
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed run from OUT.run/.")] = False,
    latency_table: Annotated[
        Path | None, typer.Option(help="JSON file of measured seconds to read and extend.")
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="Whose latency the budget means: onnxruntime, openvino or openvino_bf16.")
    ] = "onnxruntime",
    as_json: AsJson = False,
) -> None:
    """Compress a task's model until it keeps a budget, and write one file that runs by itself.

    Example: featherweight compress digits --budget "size<=2%, drop<=1pt" --report report.html
    """
    from featherweight.budget import Budget
    from featherweight.pipeline import compress as compress_model
    from featherweight.preflight import find_clocked, find_device, writable
    from featherweight.recipe_files import load_recipe
    from featherweight.tasks import find_task

    limits = Budget.parse(budget)  # first what is refused in a moment: a built-in task may train for minutes
    steps = load_recipe(recipe) if recipe is not None else None
    find_device(device)
    find_clocked(runtime)
    writable(out)
    if report is not None:
        from featherweight.report.html import check_available, write_html

        writable(report, "report.html")
        check_available()
    with _showing(as_json) as progress:
        progress(f"loading {task}", 0.0)
        found = find_task(task)
        artifact = compress_model(
            found.model,
            found.data,
            limits,
            steps,
            trials=trials,
            seed=seed,
            device=device,
            out=out,
            resume=resume,
            latency_table=latency_table,
            runtime=runtime,
            name=found.name if found.name != "task" else task,
            command=shlex.join(["featherweight", *sys.argv[1:]]),
            progress=progress,
        )
    made = artifact.report
    if report is not None:
        write_html(made, report)
    if as_json:
        _emit(_compress_facts(made, out))
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


@app.command(name="compare")
def compare_(
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
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    watts: Annotated[float, typer.Option(min=0.0, help="Of a busy core, where energy cannot be read.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Compare techniques on a task by the same rules: which one, for this model and this budget?

    Example: featherweight compare digits --recipes channels,bits,joint --budgets 4x,16x --seeds 1 --out compared
    """
    from featherweight.comparison import compare
    from featherweight.comparison.contenders import chosen
    from featherweight.tasks import find_task

    chosen(recipes)  # first what is refused in a moment: a built-in task may train for minutes
    with _showing(as_json) as progress:
        progress(f"loading {task}", 0.0)
        found = compare(
            find_task(task),
            recipes,
            budgets,
            out=out,
            seeds=seeds,
            epochs=epochs,
            tries=tries,
            device=device,
            watts=watts,
            name=task,
            command=shlex.join(["featherweight", *sys.argv[1:]]),
            progress=progress,
        )
    if as_json:
        _emit({"folder": str(out), "answers": found.answers, "ranking": found.ranking})
        return
    for answer in found.answers:
        Console().print(answer["text"], markup=False, highlight=False)


@app.command()
def plan(
    task: TaskName,
    budget: Annotated[str, typer.Option(help="Limits, such as [b]'size<=2%, drop<=1pt'[/b].")],
    trials: Annotated[int, typer.Option(min=1, help="Most candidates that compress would train.")] = 12,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say what a budget asks of a task's model, whether it is within reach, and how long it would take. Exit code 2: it is not.

    Example: featherweight plan digits --budget "size<=2%, drop<=1pt"
    """
    from featherweight.budget import Budget
    from featherweight.planning import plan as plan_model
    from featherweight.tasks import find_task

    limits = Budget.parse(budget)
    with _showing(as_json) as progress:
        progress(f"loading {task}", 0.0)
        found = find_task(task)
        facts = plan_model(found.model, found.data, limits, trials, seed, device, progress)
    _show(facts, f"{task}: {limits}", as_json)
    raise typer.Exit(0 if facts["feasible"] else 2)


@app.command()
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
    _show(facts, subject, as_json)


@app.command()
def analyze(task: TaskName, as_json: AsJson = False) -> None:
    """Print the damage and cost tables: what each way to store a weight loses, in nats of the output, and takes, in bytes.

    Damage is measured on calibration data without labels, one weight at a time.
    """
    from featherweight.inspection import analyze_task
    from featherweight.tasks import find_task

    with _showing(as_json) as progress:
        progress(f"loading {task}", 0.0)
        found = find_task(task)
        tables = analyze_task(found.model, found.data, progress)
    if as_json:
        _emit(tables.to_json())
        return
    from featherweight.report.damages import damage_tables

    for table in damage_tables(tables):
        Console().print(table)


@app.command()
def inspect(file: FileName, as_json: AsJson = False) -> None:
    """Show what is in a file: recipe, facts, bytes by part, layers. Nothing in it is executed."""
    from featherweight.artifact import load
    from featherweight.inspection import inspect_artifact

    _show(inspect_artifact(load(file)), str(file), as_json)


@app.command()
def run(
    file: FileName,
    inputs: Annotated[
        Path,
        typer.Option("--input", help="One array as .npy, or several named ones as .npz; dimension 0 is the batch."),
    ],
    output: Annotated[
        Path, typer.Option("--output", help="Where the outputs go: .npy for a single one, .npz for several.")
    ],
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Run a file on ONNX Runtime; it needs neither the original class nor its code."""
    from featherweight.arrays import check_output, read_arrays, run_batched, write_arrays
    from featherweight.artifact import load

    check_output(output)
    artifact = load(file)
    names, outputs = run_batched(artifact, read_arrays(inputs), batch)
    write_arrays(output, names, outputs)
    _show(
        {"file": str(file), "outputs": names, "shapes": [list(value.shape) for value in outputs]}, str(output), as_json
    )


@app.command()
def export(
    file: FileName,
    to: Annotated[str, typer.Option(help="A runtime's format; see [b]list runtimes[/b].")] = "onnx",
    out: Annotated[Path, typer.Option(help="Folder for the exported files.")] = Path("exported"),
    task: Annotated[
        str | None, typer.Option(help="The task it was made from: its class and data, to compare on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a file to a runtime's format, check that it computes the same, and show how it computes each layer."""
    from featherweight.inspection import export_file
    from featherweight.tasks import find_task

    _show(export_file(file, to, out, find_task(task) if task is not None else None), str(file), as_json)


@app.command()
def verify(file: FileName, as_json: AsJson = False) -> None:
    """Check a file: checksum, every stream, the graph, and a run on noise. Exit code 1 and a reason if anything is wrong."""
    from featherweight.artifact import load
    from featherweight.inspection import verify_artifact

    _show(verify_artifact(load(file)), str(file), as_json)


@app.command()
def pack(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS.safetensors", help="Tensors of any model.")],
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("weights.fw"),
    sqnr: Annotated[
        float | None, typer.Option(help="Round, and keep at least so many dB of signal to noise in each tensor.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Round until the file is this small: [b]500KB[/b], [b]10%[/b] or [b]8x[/b].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack tensors into one small file: lossless, or rounded to a stated quality or size.

    Example: featherweight pack model.safetensors --size 10% --out model.fw
    """
    from featherweight.budget import Budget
    from featherweight.packing import packed_file

    limit = Budget.parse(f"size<={size}").limits[0] if size is not None else None
    _show(packed_file(weights, out, sqnr, limit), str(out), as_json)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(metavar="WEIGHTS.fw", help="What [b]pack[/b] made.")],
    out: Annotated[Path, typer.Option(help="Where the tensors go.")] = Path("weights.safetensors"),
    as_json: AsJson = False,
) -> None:
    """Unpack tensors into a safetensors file."""
    from featherweight.packing import unpacked_file

    _show(unpacked_file(file, out), str(out), as_json)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="techniques|tasks|runtimes", help="What to list.")] = "techniques",
    as_json: AsJson = False,
) -> None:
    """List techniques with their settings, tasks, or runtimes."""
    rows = _rows(what)
    if as_json:
        _emit({what: rows})
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


def _show(facts: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        _emit(facts)
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


__all__ = ["app", "main"]
