"""Where the cells of a comparison are carried out: in this process or another, one original open at a time, on one thread."""

from __future__ import annotations

import base64
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from featherweight.comparison.cells import Cell, Ground, Rules
from featherweight.data import Task
from featherweight.latency import one_thread
from featherweight.tasks import find_task
from featherweight.trials import Assignment

Originals = Task | str | Callable[[int], Task]
"""A model with its data, its name as the command line has it, or a function from a seed to one."""


def nothing(message: str, done: float) -> None:
    """Say nothing."""


class CellBench:
    """Carries out cells by their numbers.

    Attributes:
        cells: all of the comparison.
        far: whether cells are carried out in a folder of this machine's own, and their files come back with the facts.
    """

    def __init__(
        self,
        originals: Originals,
        rules: Rules,
        cells: Sequence[Cell],
        far: bool = False,
        progress: Callable[[str, float], None] = nothing,
    ) -> None:
        self.cells, self.far = cells, far
        self._originals, self._rules, self._progress = originals, rules, progress
        self._ground: Ground | None = None

    @functools.cached_property
    def _opened(self) -> Task | Callable[[int], Task]:
        """The originals; one that is named is loaded once."""
        if not isinstance(self._originals, str):
            return self._originals
        self._progress(f"loading {self._originals}", 0.0)
        return find_task(self._originals)

    @property
    def sent(self) -> Originals:
        """What another process opens: a built-in task may have trained for minutes, and a user's own is of a file of theirs."""
        own = isinstance(self._originals, str) and ":" in self._originals
        return self._originals if own else self._opened

    def ground(self, seed: int) -> Ground:
        """Return the original of a seed, measured; only the last one asked for is in memory."""
        if self._ground is None or self._ground.seed != seed:
            self._ground = None
            task = self._opened if isinstance(self._opened, Task) else self._opened(seed)
            with one_thread():
                self._ground = Ground(task, seed)
        return self._ground

    def __call__(self, assignment: Assignment) -> dict[str, Any]:
        """Return the `facts` of a cell, and from far away its `files` by suffix, as text of base 64."""
        cell = self.cells[assignment.number]
        ground = self.ground(cell.seed)
        with one_thread():
            if not self.far:
                return {"facts": cell.run(ground, self._rules, self._progress)}
            with tempfile.TemporaryDirectory() as folder:
                moved = dataclasses.replace(cell, folder=Path(folder))
                facts = moved.run(ground, self._rules, self._progress)
                files = {path.suffix: path.read_bytes() for path in moved.files() if path.exists()}
        return {"facts": facts, "files": {suffix: base64.b64encode(held).decode() for suffix, held in files.items()}}

    def received(self, assignment: Assignment, result: dict[str, Any]) -> dict[str, Any]:
        """Return the facts of a result, its files put where the cell's lie."""
        cell, facts = self.cells[assignment.number], dict(result["facts"])
        for path in cell.files() if "files" in result else ():
            if path.suffix in result["files"]:
                path.write_bytes(base64.b64decode(result["files"][path.suffix]))
        if "files" in result:
            if facts["status"] == "done":
                facts["command"] = cell.command(self._rules)  # the recipe's path in it was another machine's
            cell.keep(facts)
        return facts
