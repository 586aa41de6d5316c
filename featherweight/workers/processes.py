"""Trials in processes of this machine: a process that is killed costs its trial, which another one starts again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from featherweight.errors import DataError
from featherweight.trials import Assignment, Measure
from featherweight.workers import Done, Result, attempt
from featherweight.workers.spool import Spool


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    assignment: Assignment | None = None


class Processes:
    """Worker processes, started when they are first needed and kept.

    They are spawned, so a script that searches with several must do so under `if __name__ == "__main__":`.
    """

    def __init__(self, open_bench: Callable[[], Measure], count: int, spool: Path, retries: int = 2) -> None:
        """Say who is to work; nothing starts yet.

        Args:
            open_bench: called once in each process, where it must be importable; returns what measures.
            count: processes.
            spool: folder for results on their way to this process; what a killed search left there is not run again.
            retries: how often a trial whose process died is started again before it counts as failed.
        """
        self.open_bench, self.count, self.retries, self.spool = open_bench, count, retries, Spool(spool)
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, assignments: Sequence[Assignment], done: Done) -> None:
        """Carry all of them out.

        Raises:
            DataError: a worker cannot open the task.
        """
        left = []
        for assignment in assignments:
            kept = self.spool.fetch(assignment)
            if kept is None:
                left.append(assignment)
            else:
                self._end(assignment, kept, done)
        waiting, tries = deque(left), {assignment.number: 1 for assignment in left}
        while waiting or any(worker.assignment for worker in self._workers):
            self._assign(waiting)
            pipes = {worker.pipe: worker for worker in self._workers}
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                given, worker.assignment = worker.assignment, None
                try:
                    result: Result = worker.pipe.recv()
                except (EOFError, OSError):  # the process is dead
                    self._remove(worker)
                    if given is None:
                        continue
                    stored = self.spool.fetch(given)
                    if stored is None and tries[given.number] <= self.retries:
                        tries[given.number] += 1
                        waiting.appendleft(given)
                        continue
                    died = {"failed": f"its process died {tries[given.number]} times", "seconds": 0.0, "worker": ""}
                    result = died if stored is None else stored
                if given is None or result.pop("unopened", False):
                    raise DataError(f"a worker cannot open the task: {result['failed']}")
                self._end(given, result, done)

    def _end(self, given: Assignment, result: Result, done: Done) -> None:
        done(given, result)
        self.spool.forget(given)

    def _assign(self, waiting: deque[Assignment]) -> None:
        """Give everyone without work an assignment, and start processes while there are too few."""
        while len(self._workers) < min(self.count, len(waiting) + sum(w.assignment is not None for w in self._workers)):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(self.open_bench, theirs, self.spool), daemon=True)
            try:
                process.start()
            except Exception as error:  # pickling has one error for each thing it cannot do
                raise DataError(
                    f"the task cannot be sent to another process ({error}): "
                    "put it in a file and name it, as path/to/file.py:function"
                ) from error
            theirs.close()
            self._workers.append(_Worker(process, ours))
        for worker in list(self._workers):
            if worker.assignment is None and waiting:
                try:
                    worker.pipe.send(waiting[0])
                except OSError:  # it died idle
                    self._remove(worker)
                    continue
                worker.assignment = waiting.popleft()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()

    def close(self) -> None:
        """End all processes at once."""
        for worker in list(self._workers):
            self._remove(worker)


def _serve(open_bench: Callable[[], Measure], pipe: Connection, spool: Spool) -> None:
    """Work until the pipe is closed, and never longer than the process that gives the work lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who gives the work
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        measure = open_bench()
    except Exception as error:  # whatever the user's task raises
        pipe.recv()
        pipe.send({"failed": f"{type(error).__name__}: {error}"[:500], "seconds": 0.0, "worker": "", "unopened": True})
        return
    while True:
        try:
            assignment = pipe.recv()
        except EOFError:
            return
        result = attempt(measure, assignment)
        spool.store(assignment, result)
        pipe.send(result)


def _follow_parent() -> None:
    """End this process, in the middle of a trial too, when the parent is gone: a resumed search will run that trial."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
