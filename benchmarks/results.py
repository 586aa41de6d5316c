"""Rows of `benchmarks/results/*.json`: each written by the script that measured it, one file a script."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from featherweight.measurement import machine

FOLDER = Path(__file__).parent / "results"


def record(file: str, identifier: str, got: float | None, seeds: int, note: str, details: Any = None) -> None:
    """Write or replace one row.

    Args:
        file: name of the results file, without its ending.
        identifier: the figure's id.
        got: what was measured, or None when it could not be had; the note then says why.
        seeds: how many seeds are behind it.
        note: what a reader must know.
        details: further measurements, JSON-able.
    """
    path = FOLDER / f"{file}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    command = "python " + shlex.join([str(Path(sys.argv[0])), *sys.argv[1:]])
    row = {"id": identifier, "got": got, "seeds": seeds, "command": command, "machine": machine(), "note": note}
    rows = [other for other in rows if other["id"] != identifier] + [
        {**row, "details": details} if details is not None else row
    ]
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(sorted(rows, key=lambda item: item["id"]), indent=1) + "\n")


def kept(file: str) -> dict[str, Any]:
    """Return the partial results of a benchmark that is run in several sittings, `{}` at first."""
    path = FOLDER / f"{file}.partial.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(file: str, partial: dict[str, Any]) -> None:
    """Store partial results after each finished run."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{file}.partial.json").write_text(json.dumps(partial, indent=1) + "\n")
