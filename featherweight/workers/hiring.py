"""Who is to carry out assignments, by what the caller asked for: this process, several of this machine, or a Ray cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import DataError
from featherweight.trials import Measure
from featherweight.workers import InProcess, Workers
from featherweight.workers.cluster import Cluster
from featherweight.workers.processes import Processes

_SPOOL = "results"


@dataclass(frozen=True)
class Crew:
    """Who works.

    Attributes:
        workers: processes of this machine; 1 is this one.
        ray: address of a Ray cluster, which then does all work, or None.
        cpus: that one assignment takes of the cluster.
        gpus: that one assignment takes of the cluster.
    """

    workers: int = 1
    ray: str | None = None
    cpus: float = 1
    gpus: float = 0

    @property
    def alone(self) -> bool:
        """Whether this process does all work."""
        return self.ray is None and self.workers == 1

    @contextmanager
    def hired(
        self, here: Measure, open_near: Callable[[], Measure], open_far: Callable[[], Measure], folder: Path
    ) -> Iterator[Workers]:
        """Lend the workers; those of other processes start when they are first needed, and all are let go at the end.

        Args:
            here: carries out assignments in this process.
            open_near: returns what does in another process of this machine.
            open_far: returns what does on a node of a cluster, which may have none of this machine's folders.
            folder: of the run; results on their way from processes of this machine lie in a folder of it, until the run is done.

        Raises:
            DataError: `workers` is below 1, or there is no cluster at the address.
            ExportError: Ray is not installed.
        """
        spool = folder / _SPOOL
        workers = self._workers(here, open_near, open_far, spool)
        try:
            yield workers
        finally:
            workers.close()
        shutil.rmtree(spool, ignore_errors=True)

    def _workers(
        self, here: Measure, open_near: Callable[[], Measure], open_far: Callable[[], Measure], spool: Path
    ) -> Workers:
        if self.ray is not None:
            return Cluster(self.ray, open_far, self.cpus, self.gpus)
        if self.workers < 1:
            raise DataError(f"workers={self.workers} must be at least 1")
        return InProcess(here) if self.workers == 1 else Processes(open_near, self.workers, spool)


THIS_PROCESS = Crew()
