"""Workers: a process or node that is killed costs its trial, which runs again; nobody works on after the search is dead."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featherweight.errors import DataError
from featherweight.trials import Assignment
from featherweight.workers import InProcess
from featherweight.workers.processes import Processes
from featherweight.workers.spool import Spool

JOBS = [Assignment(number, 0, 1.0, {"steps": []}) for number in (0, 1, 3, 2)]


class Deadly:
    """Trial 1 kills its process the first time, trial 2 every time, trial 3 fails; what runs leaves a line in a file."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, assignment):
        with (self.folder / f"{assignment.number}").open("a") as file:
            file.write(f"{os.getpid()}\n")
        runs = len((self.folder / f"{assignment.number}").read_text().splitlines())
        if assignment.number == 2 or (assignment.number == 1 and runs == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if assignment.number == 3:
            raise ValueError("cannot be quantized")
        return {"values": {"size": 10.0 * assignment.number}}


def refuses():
    raise OSError("no such data")


def runs(folder, number):
    return len((folder / str(number)).read_text().splitlines())


def test_a_killed_process_costs_its_trial_which_runs_again(tmp_path):
    workers, results = Processes(functools.partial(Deadly, tmp_path), 1, tmp_path / "spool", retries=1), {}
    try:
        workers.run(JOBS[:1], lambda given, result: results.setdefault(given.number, result))
        workers.run(JOBS[1:], lambda given, result: results.setdefault(given.number, result))
    finally:
        workers.close()
    assert results[0]["values"] == {"size": 0.0}
    assert results[1]["values"] == {"size": 10.0}
    assert results[2]["failed"] == "its process died 2 times"
    assert results[3]["failed"] == "ValueError: cannot be quantized"
    assert [runs(tmp_path, number) for number in range(4)] == [1, 2, 2, 1]
    assert str(os.getpid()) not in (tmp_path / "0").read_text()
    assert not list((tmp_path / "spool").iterdir())


def test_what_ended_before_the_search_was_killed_is_not_run_again(tmp_path):
    spool, results = Spool(tmp_path), []
    spool.store(JOBS[0], {"values": {"size": 1.0}})
    other = Assignment(0, 0, 1.0, {"steps": ["distill"]})
    assert spool.fetch(other) is None
    assert spool.fetch(JOBS[1]) is None
    Processes(refuses, 1, tmp_path).run(JOBS[:1], lambda given, result: results.append(result))
    assert results == [{"values": {"size": 1.0}}]
    assert not list(tmp_path.iterdir())  # it is in the journal now


def test_in_this_process(tmp_path):
    results = []
    InProcess(Deadly(tmp_path)).run([JOBS[0], JOBS[2]], lambda given, result: results.append(result))
    assert results[0]["values"] == {"size": 0.0}
    assert results[1]["failed"] == "ValueError: cannot be quantized"


def test_a_task_that_cannot_be_opened_or_sent_is_said(tmp_path):
    workers = Processes(refuses, 1, tmp_path)
    with pytest.raises(DataError, match="cannot open the task: OSError: no such data"):
        workers.run(JOBS, lambda given, result: None)
    workers.close()
    with pytest.raises(DataError, match=r"cannot be sent .* path/to/file\.py:function"):
        Processes(lambda: None, 1, tmp_path).run(JOBS, lambda given, result: None)


FOREVER = """
import sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from featherweight.trials import Assignment
from featherweight.workers.processes import Processes

class Slow:
    def __call__(self, assignment):
        Path({folder!r}, "pid").write_text(str(__import__("os").getpid()))
        time.sleep(600)

if __name__ == "__main__":
    Processes(Slow, 1, Path({folder!r})).run([Assignment(0, 0, 1.0, None)], print)
"""


def test_workers_end_in_the_middle_of_a_trial_when_the_search_is_killed(tmp_path):
    script, note, ends = tmp_path / "forever.py", tmp_path / "pid", time.monotonic() + 60
    script.write_text(FOREVER.format(folder=str(tmp_path)))
    search = subprocess.Popen([sys.executable, str(script)])
    try:
        while not (note.exists() and note.read_text()) and time.monotonic() < ends:
            assert search.poll() is None
            time.sleep(0.05)
    finally:
        search.kill()
        search.wait()
    while Path(f"/proc/{note.read_text()}").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert not Path(f"/proc/{note.read_text()}").exists()


def test_a_node_of_a_cluster_that_dies_costs_its_trial_which_runs_again(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # for the nodes
    from ray.cluster_utils import Cluster as LocalCluster

    from featherweight.workers.cluster import Cluster

    nodes = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    lost = nodes.add_node(num_cpus=1)
    workers, results = Cluster(nodes.address, Waiting), {}
    killed = []

    def done(given, result):
        results[given.number] = result
        if not killed:  # the other one runs, or waits, on the only node
            killed.append(given.number)
            nodes.remove_node(lost, allow_graceful=False)
            nodes.add_node(num_cpus=1)

    try:
        assert workers.count == 1
        workers.run(JOBS[:2], done)
    finally:
        workers.close()
        nodes.shutdown()
    assert {number: result["values"] for number, result in results.items()} == {0: {"size": 0.0}, 1: {"size": 1.0}}


class Waiting:
    """A trial that takes long enough to be killed in."""

    def __call__(self, assignment):
        time.sleep(0.5)
        return {"values": {"size": float(assignment.number)}}


def test_no_cluster_is_said():
    pytest.importorskip("ray")
    from featherweight.workers.cluster import Cluster

    with pytest.raises(DataError, match=r"no Ray cluster at '127\.0\.0\.1:1'.* ray start --head"):
        Cluster("127.0.0.1:1", Waiting)
