"""Killed in the middle of training and started again: the same file, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from featherweight.budget import Budget
from featherweight.errors import RecipeError
from featherweight.pipeline import compress
from featherweight.preflight import Request, open_workspace
from featherweight.techniques import Distill, PruneWeights, QuantizeWeights

BUDGET = "size<=60%, drop<=5pt"
RECIPE = "steps: [prune_weights: {ratio: 0.6, epochs: 8}, quantize_weights: {bits: 6}]"


def request(out, resume, recipe=None, seed=0):
    """A request as `compress` makes it."""
    return Request(Budget.parse(BUDGET), recipe, 20, seed, torch.device("cpu"), out, resume, None)


# The user's task, with a loader that sleeps and shuffles, so that a kill lands in the middle.
SLOW = """
import time
from clusters import task as plain_task
from dataclasses import replace
from torch.utils.data import DataLoader


class Slow:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for inputs, labels in self.loader:
            time.sleep(0.01)
            yield inputs, labels

    def __len__(self):
        return len(self.loader)


def task():
    made = plain_task()
    samples = [(row, label) for rows, labels in made.data.train for row, label in zip(rows, labels)]
    return replace(made, data=replace(made.data, train=Slow(DataLoader(samples, 32, shuffle=True))))
"""


@pytest.fixture(scope="module")
def folder(task_file, tmp_path_factory):
    made = tmp_path_factory.mktemp("resume")
    (made / "clusters.py").write_text(task_file.read_text())
    (made / "slow.py").write_text(SLOW)
    (made / "recipe.yaml").write_text(RECIPE)
    return made


OPTIONS = ("compress", "slow.py:task", "--budget", BUDGET, "--recipe", "recipe.yaml", "--json", "--out")


def epochs_done(run):
    """The epochs in every checkpoint of a killed run, by file."""
    done = {}
    for path in run.glob("train-*.safetensors"):
        with safe_open(path, "pt") as stored:
            done[path.name] = json.loads(stored.metadata()["facts"])["epoch"]
    return done


def kill(folder, out, enough):
    """Start a process of its own, and kill it once what its checkpoints hold is enough."""
    process = subprocess.Popen(
        [sys.executable, "-m", "featherweight", *OPTIONS, out],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run, ends = folder / f"{out}.run", time.monotonic() + 120
    try:
        while not enough(epochs_done(run)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < ends
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / out).exists()
    return run


@pytest.fixture
def compressed(command, folder, monkeypatch):
    """Compress in this process; gives the facts and the file."""
    monkeypatch.chdir(folder)

    def call(out, *options):
        done = command(*OPTIONS, out, *options)
        assert done.code in (0, 2), done.err
        return json.loads(done.out), (folder / out).read_bytes()

    return call


def test_a_killed_run_continues_to_the_same_file(folder, compressed):
    facts, whole = compressed("whole.fw")
    run = kill(folder, "killed.fw", lambda epochs: any(epoch >= 2 for epoch in epochs.values()))
    assert next(iter(epochs_done(run).values())) < 8  # in the middle of the pruning
    again, resumed = compressed("killed.fw", "--resume")
    assert resumed == whole
    for key in ("file_bytes", "score_after", "agreement", "recipe", "nonzero"):
        assert again[key] == facts[key]
    assert not run.exists()


class Stop(Exception):  # noqa: N818 - stands for a kill
    """Ends a run in this process."""


def stop_at(words):
    """A progress callback that ends the run at a message."""

    def progress(message, done):
        if words in message:
            raise Stop

    return progress


STEPS = PruneWeights(ratio=0.5, epochs=2) + Distill(epochs=4)


@pytest.fixture(scope="module")
def uninterrupted(clusters):
    return compress(clusters.model, clusters.data, BUDGET, STEPS).to_bytes()


@pytest.mark.parametrize("corrupt", [False, True])
def test_epochs_done_are_not_repeated_and_a_corrupt_checkpoint_only_costs_time(
    clusters, uninterrupted, tmp_path, corrupt
):
    steps, given = STEPS, (clusters.model, clusters.data, BUDGET)
    out = tmp_path / "model.fw"
    with pytest.raises(Stop):
        compress(*given, steps, out=out, progress=stop_at("distill(epochs=4): epoch 3/4"))
    files = list((tmp_path / "model.fw.run").glob("train-*.safetensors"))
    assert len(files) == 2
    if corrupt:
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = []
    compress(*given, steps, out=out, resume=True, progress=lambda message, done: said.append(message))
    assert out.read_bytes() == uninterrupted
    assert ("distill(epochs=4): epoch 1/4" in said) == corrupt
    assert "distill(epochs=4): epoch 3/4" in said


def test_resume_is_refused_for_another_request(clusters, tmp_path):
    steps = QuantizeWeights(bits=8) + Distill(epochs=1)
    asked = request(tmp_path / "model.fw", False, steps)
    open_workspace(asked.workspace, asked)
    out, given = tmp_path / "model.fw", (clusters.model, clusters.data)
    for budget, recipe, seed, words in (
        ("size<=50%, drop<=5pt", steps, 0, "budget='size<=60%, drop<=5pt', not 'size<=50%, drop<=5pt'"),
        (BUDGET, steps, 1, "seed=0, not 1"),
        (BUDGET, QuantizeWeights(bits=4), 0, "recipe="),
    ):
        with pytest.raises(RecipeError) as caught:
            compress(*given, budget, recipe, seed=seed, out=out, resume=True)
        assert words in str(caught.value)
        assert "resume with the same" in str(caught.value)


def test_resume_is_refused_where_there_is_nothing(refused, task_file, tmp_path):
    options = ("--budget", BUDGET, "--out", tmp_path / "model.fw", "--resume", "--json")
    refused("compress", f"{task_file}:task", *options, words=["nothing to resume", "model.fw.run"])


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_resume_is_refused_where_the_request_cannot_be_read(tmp_path, text):
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(RecipeError, match=r"request\.json cannot be read"):
        open_workspace(tmp_path, request(None, True))


def test_without_resume_a_run_starts_afresh(tmp_path):
    (tmp_path / "train-x.safetensors").write_text("old")
    (tmp_path / "request.json").write_text("{}")
    open_workspace(tmp_path, request(None, False))
    assert [item.name for item in tmp_path.iterdir()] == ["request.json"]
