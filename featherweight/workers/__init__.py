"""Who carries trials out: this process, several processes of this machine, or a Ray cluster."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from featherweight.trials import Assignment, Measure

Result = dict[str, Any]
"""What a trial gave, JSON-able: `values`, or `failed`, why there are none; `seconds` and `worker`."""
Done = Callable[[Assignment, Result], None]


class Workers(Protocol):
    """Anything that carries out assignments, in any order and place; a worker that dies costs its trial, which is retried."""

    @property
    def count(self) -> int:
        """How many trials run at once."""

    def run(self, assignments: Sequence[Assignment], done: Done) -> None:
        """Carry all of them out, and call `done`, in this process, as each one ends."""

    def close(self) -> None:
        """Let the workers go."""


def attempt(measure: Measure, assignment: Assignment) -> Result:
    """Return what a trial gave; a recipe that fails is a result too, since it would fail again anywhere."""
    start = time.perf_counter()
    try:
        found = measure(assignment)
    except Exception as error:  # whatever the user's model, data or loss raises
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {
        **found,
        "seconds": round(time.perf_counter() - start, 3),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
    }


class InProcess:
    """One trial after the other, in this process."""

    count = 1

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def run(self, assignments: Sequence[Assignment], done: Done) -> None:
        """Carry all of them out."""
        for assignment in assignments:
            done(assignment, attempt(self.measure, assignment))

    def close(self) -> None:
        """There is nobody to let go."""
