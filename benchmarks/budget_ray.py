"""A search on a Ray cluster of three nodes on this machine, one killed at a third of the trials, another joined at half.

Each node is a process tree of its own, started by `ray.cluster_utils` as `ray start` starts them. Trials sleep for five seconds, so that
the time beyond them is the engine's. The same search runs on this machine alone, without the sleep, for the best recipe.

python benchmarks/budget_ray.py
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from budget_trials import Sleeping, ended, plan, space
from ray.cluster_utils import Cluster as Nodes
from results import record

from featherweight.journal import Journal
from featherweight.study import Standing, Study
from featherweight.trials import Assignment
from featherweight.workers import InProcess, Workers
from featherweight.workers.cluster import Cluster

Watch = Callable[[Standing], None]
TRIALS, SECONDS, NAME = 24, 5.0, "budget_ray"


def nobody(standing: Standing) -> None:
    """Watch nothing."""


def main() -> None:
    """Search three times and write the rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = _searched(folder / "alone", InProcess(Sleeping(0.0, folder)))
        (folder / "ended").unlink()
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        three = [nodes.add_node(num_cpus=1) for _ in range(3)]
        workers = Cluster(nodes.address, functools.partial(Sleeping, SECONDS, folder))
        try:
            start = time.perf_counter()
            warm = [
                Assignment(number, 0, 1.0, {"steps": [{"prune_weights": {}}, {"quantize_weights": {}}]})
                for number in range(6)
            ]
            workers.run(warm, lambda given, result: None)
            began = time.perf_counter() - start - 2 * SECONDS
            seconds, steady = _timed(folder / "steady", workers)
            events: list[str] = []

            def disturb(standing: Standing) -> None:
                if standing.done == TRIALS // 3 and not events:
                    nodes.remove_node(three[0], allow_graceful=False)
                    events.append(f"a node killed after {standing.done} trials")
                if standing.done == TRIALS // 2 and len(events) == 1:
                    nodes.add_node(num_cpus=1)
                    events.append(f"another joined after {standing.done}")

            before = len(ended(folder))
            _, disturbed = _timed(folder / "disturbed", workers, disturb)
            runs = len(ended(folder)) - before
        finally:
            workers.close()
            nodes.shutdown()
    if len(events) != 2:
        raise RuntimeError(f"only this happened: {events}")
    finished = disturbed.done - disturbed.failed
    note = f"three nodes of one CPU beside the head, {', '.join(events)}; {TRIALS} trials of {SECONDS:g} s, {runs} runs that ended"
    record(NAME, "budget.ray.finished", finished, 1, note)
    same = [disturbed.best == other.best or _recipe(disturbed) == _recipe(other) for other in (alone, steady)]
    record(
        NAME,
        "budget.ray.same_best",
        int(all(same)),
        1,
        f"trial {disturbed.best['trial']} on one machine and twice on the cluster" if disturbed.best else "none",
    )
    trials = TRIALS * SECONDS
    note = (
        f"(3 nodes x {seconds:.1f} s - {trials:g} s of trials) / {trials:g} s: {TRIALS} trials in generations of 12, undisturbed, in "
        f"processes that run already; their start, which imports PyTorch on each node, once took {began:.1f} s before"
    )
    record(NAME, "budget.ray.overhead", (3 * seconds - trials) / trials, 1, note)


def _searched(path: Path, workers: Workers, watch: Watch = nobody) -> Standing:
    with Journal(path) as journal:
        return Study(space, plan(TRIALS, generation=12), journal).run(workers, watch)


def _timed(path: Path, workers: Workers, watch: Watch = nobody) -> tuple[float, Standing]:
    start = time.perf_counter()
    standing = _searched(path, workers, watch)
    return time.perf_counter() - start, standing


def _recipe(standing: Standing) -> object:
    return standing.best["recipe"] if standing.best is not None else None


if __name__ == "__main__":
    main()
