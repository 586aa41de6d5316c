"""The command line: every command under its name, and every error one line."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any, NoReturn

import typer

from featherweight.commands import files
from featherweight.commands.compare import compare
from featherweight.commands.compress import compress, plan
from featherweight.commands.console import screen
from featherweight.commands.listing import listing
from featherweight.commands.measure import analyze, measure
from featherweight.commands.search import search
from featherweight.errors import FeatherweightError

app = typer.Typer(
    name="featherweight",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Make trained PyTorch models small and fast: state a budget, get one file that keeps it, and a report that proves it.",
    epilog="Exit codes: 0 the budget is met; 2 it was missed, the closest artifact is written; 1 an error.",
)
_COMMANDS = (
    *(compress, plan, search, compare, measure, analyze),
    *(files.inspect, files.run, files.export, files.verify, files.pack, files.unpack),
)
_UsageError: Any = typer.BadParameter.__base__  # the class itself lives in click or in typer, depending on the version
_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt

for command in _COMMANDS:
    app.command()(command)
app.command(name="list")(listing)


def main() -> None:
    """Run the command line; every error of ours is one line on standard error and exit code 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not gc.get_freeze_count():
        gc.freeze()  # the end of the process would look for garbage in all that was imported, which takes a second
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
    screen.print(f"error: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


__all__ = ["app", "main"]
