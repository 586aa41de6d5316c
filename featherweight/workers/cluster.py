"""Trials as tasks of a Ray cluster: each asks for its resources, and runs again elsewhere when its node dies."""

from __future__ import annotations

import functools
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from featherweight.errors import DataError, need
from featherweight.trials import Assignment, Measure
from featherweight.workers import Done, Result, attempt


class Cluster:
    """A Ray cluster that runs already, or `"local"` for one that starts and ends with this process."""

    def __init__(
        self, address: str, open_bench: Callable[[], Measure], cpus: float = 1, gpus: float = 0, retries: int = 4
    ) -> None:
        """Connect.

        Args:
            address: of the head, as `ray start` prints it, such as `"10.0.0.1:6379"`; `"auto"` finds one on this machine.
            open_bench: called once in each Ray process; `featherweight` must be installed on every node, and the file of a
                user's task lie at the same path.
            cpus: that one trial takes.
            gpus: that one trial takes.
            retries: how often a trial whose process or node died is started again before it counts as failed.

        Raises:
            DataError: there is no cluster at the address.
            ExportError: Ray is not installed.
        """
        self._ray: Any = need("ray", "ray", "a search on a cluster")
        _knock(address)
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray has one error for each way of failing to connect
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"there is no Ray cluster at {address!r}: {lines[0]}; start one with: ray start --head"
            ) from error
        self._bench, self._token, self._cpus = self._ray.put(open_bench), uuid.uuid4().hex, cpus
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries, "scheduling_strategy": "SPREAD"}
        self._task = self._ray.remote(**options)(_run)

    @property
    def count(self) -> int:
        """How many trials the cluster runs at once, as it is now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1) // max(self._cpus, 0.01)))

    def run(self, assignments: Sequence[Assignment], done: Done) -> None:
        """Carry all of them out.

        Raises:
            DataError: a node cannot open the task.
        """
        running = {self._task.remote(self._token, self._bench, given): given for given in assignments}
        while running:
            ready, _ = self._ray.wait(list(running), num_returns=1)
            given = running.pop(ready[0])
            try:
                result: Result = self._ray.get(ready[0])
            except self._ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [""]  # the last one says what, those before it where
                result = {"failed": f"{type(error).__name__}: {lines[-1]}"[:500], "seconds": 0.0, "worker": ""}
            if result.pop("unopened", False):
                raise DataError(f"a node cannot open the task: {result['failed']}")
            done(given, result)

    def close(self) -> None:
        """Disconnect; the cluster goes on."""
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Say in seconds that nobody is there, which Ray says after minutes.

    Raises:
        DataError: nobody is there.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise DataError(f"there is no Ray cluster at {address!r}: {error}; start one with: ray start --head") from error


def _run(token: str, open_bench: Callable[[], Measure], assignment: Assignment) -> Result:
    """What a task does, in a process of a node."""
    try:
        measure = _opened(token, open_bench)
    except Exception as error:  # whatever the user's task raises
        return {"failed": f"{type(error).__name__}: {error}"[:500], "seconds": 0.0, "worker": "", "unopened": True}
    return attempt(measure, assignment)


@functools.lru_cache(maxsize=1)
def _opened(token: str, open_bench: Callable[[], Measure]) -> Measure:
    """The bench of one search, opened once in each process, which serves many trials."""
    return open_bench()
