"""`featherweight search`: the command, and the live table of how a search stands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from featherweight.commands.console import AsJson, Cpus, Gpus, Processes, RayAddress, Seed, emit, screen
from featherweight.errors import RecipeError, need
from featherweight.verdict import format_amount

if TYPE_CHECKING:
    from featherweight.journal import Row
    from featherweight.study import Standing


def search(
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="A built-in name or [b]path/to/file.py:function[/b] that returns a Task."),
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Limits, such as [b]'size<=2%, drop<=1pt'[/b].")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the journal, the front and the best file.")] = Path("search"),
    trials: Annotated[int, typer.Option(min=1, help="Recipes to draw.")] = 24,
    sampler: Annotated[str, typer.Option(help="nsga2, tpe, gp or random.")] = "nsga2",
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Of one heal at full length.")] = 10,
    rungs: Annotated[str, typer.Option(help="Shares of the training; a third is promoted to the next.")] = "0.2,1",
    generation: Annotated[int, typer.Option(min=1, help="Trials drawn before their results are looked at.")] = 8,
    workers: Processes = 1,
    ray: RayAddress = None,
    cpus: Cpus = 1.0,
    gpus: Gpus = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    space: Annotated[
        str | None, typer.Option(help="[b]path/to/file.py:function[/b] that returns a search space.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the folder.")] = False,
    show: Annotated[
        Path | None, typer.Option("--status", help="Only say how the search in this folder stands.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search over recipes for a budget, on one machine or many; a killed search goes on with --resume.

    Example: featherweight search digits --budget "size<=2%, drop<=1pt" --workers 2 --out search
    """
    from featherweight.exploration import Search, explore, status
    from featherweight.tasks import made_by
    from featherweight.workers.hiring import Crew

    if show is not None:
        _tell(status(show), as_json)
        return
    if task is None or budget is None:
        raise RecipeError("search needs a TASK and a --budget, or --status with the folder of a search")
    need("optuna", "search", "a search over recipes")  # said before a task trains for minutes
    how = Search(
        trials=trials,
        sampler=sampler,
        seed=seed,
        generation=generation,
        rungs=_shares(rungs),
        epochs=epochs,
        crew=Crew(workers, ray, cpus, gpus),
        device=device,
    )
    draw = made_by(space) if space is not None else None
    with _Watch(quiet=as_json) as watch:
        standing, artifact = explore(
            task,
            budget,
            out,
            how,
            space=draw,
            space_name=space or "default",
            resume=resume,
            watch=watch.show,
            progress=watch.say,
        )
    verdict = artifact.report.verdict if artifact is not None else {"met": False, "text": "no recipe worked"}
    _tell(standing, as_json, {"file": str(out / "model.fw") if artifact is not None else None, "verdict": verdict})
    raise typer.Exit(0 if verdict["met"] else 2)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"--rungs {text!r} must be numbers with commas, such as 0.2,1") from None


def _tell(standing: Standing, as_json: bool, more: dict[str, Any] | None = None) -> None:
    """Say on standard output how a search stands."""
    facts = {**standing.to_json(), **(more or {})}
    if as_json:
        emit(facts)
        return
    console = Console()
    console.print(table(standing))
    if more is not None:
        console.print(f"{more['file'] or 'no file'}: {more['verdict']['text']}", markup=False, highlight=False)


def table(standing: Standing) -> Group:
    """Return the front, the best so far, and the time left, to be shown."""
    plan = standing.plan
    front = Table(title=f"the front, {plan.budget}")
    front.add_column("trial", justify="right")
    for goal in plan.goals:
        front.add_column(goal, justify="right")
    front.add_column("keeps")
    front.add_column("recipe", overflow="ellipsis", no_wrap=True, max_width=70)
    for row in standing.front:
        over = [metric for metric, value in plan.excess(row["values"]).items() if value > 0]
        chosen = standing.best is not None and row["trial"] == standing.best["trial"]
        amounts = [format_amount(goal, row["values"][goal]) for goal in plan.goals]
        keeps = f"over {', '.join(over)}" if over else "all limits"
        front.add_row(str(row["trial"]), *amounts, keeps, _short(row), style="bold" if chosen else "")
    lines = [f"{standing.done} of {standing.total} results, {standing.failed} failed, {_time(standing.seconds_left)}"]
    for limit in plan.budget.limits:
        inside = [row for row in standing.front if plan.excess(row["values"])[limit.metric] <= 0]
        others = [goal for goal in plan.goals if goal != limit.metric]
        if inside and others:
            least = min(inside, key=lambda row: row["values"][others[0]])["values"][others[0]]
            lines.append(f"within {limit}: least {others[0]} {format_amount(others[0], least)}")
        else:
            lines.append(f"within {limit}: {'met' if inside else 'nothing yet'}")
    return Group(front, Text("\n".join(lines)))


def _short(row: Row) -> str:
    steps = row["recipe"]["steps"]
    return " + ".join(step if isinstance(step, str) else next(iter(step)) for step in steps)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time left not known yet"
    if seconds < 90:
        return f"about {seconds:.0f} s left" if seconds else "nothing left to do"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


class _Watch:
    """Shows how a search stands while it runs: a table that is redrawn on a terminal, one line a result elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.live = Live(console=screen, refresh_per_second=2) if not quiet and screen.is_terminal else None
        self.quiet, self.said = quiet, ""

    def __enter__(self) -> _Watch:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *ended: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, standing: Standing) -> None:
        """Show the standing after a result."""
        if self.live is not None:
            self.live.update(table(standing))
        elif not self.quiet:
            best = f", best trial {standing.best['trial']}" if standing.best is not None else ""
            self._line(f"{standing.done}/{standing.total} results, {_time(standing.seconds_left)}{best}")

    def say(self, message: str, done: float) -> None:
        """Show a message about what goes on besides trials."""
        if self.live is None and not self.quiet and (label := message.partition(": epoch")[0]) != self.said:
            self.said = label
            self._line(label)

    def _line(self, text: str) -> None:
        screen.print(text, markup=False, highlight=False)
