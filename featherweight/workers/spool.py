"""A folder of results that wait to be put into the journal: a trial has ended as soon as its file is there.

Between the end of a trial in a worker and its row in the journal the search may be killed; the file then tells the next one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from featherweight.trials import Assignment
from featherweight.workers import Result


class Spool:
    """Results by trial and rung, one file each, whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, given: Assignment, result: Result) -> None:
        """Keep a result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(given).with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"recipe": given.recipe, "result": result}))
        os.replace(part, self._path(given))

    def fetch(self, given: Assignment) -> Result | None:
        """Return the kept result of exactly this assignment, or None."""
        try:
            kept = json.loads(self._path(given).read_text())
        except (OSError, ValueError):
            return None
        return dict(kept["result"]) if kept["recipe"] == given.recipe else None

    def forget(self, given: Assignment) -> None:
        """Remove a result that is in the journal."""
        self._path(given).unlink(missing_ok=True)

    def _path(self, given: Assignment) -> Path:
        return self.folder / f"{given.number}-{given.rung}.json"
