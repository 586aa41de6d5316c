"""`plan`: what a budget would ask of a model, whether that is within reach, and how long it would take, in a minute or so."""

from __future__ import annotations

import copy
import dataclasses
import time
from itertools import islice
from typing import Any

from torch import nn

from featherweight.budget import Budget
from featherweight.candidates import Candidates
from featherweight.data import Data
from featherweight.job import Job, Progress
from featherweight.latency import DEFAULT
from featherweight.mixes import MIXES
from featherweight.preflight import Request, find_clock, find_device
from featherweight.technique import Context
from featherweight.techniques import together
from featherweight.techniques.train import Training, fit

_BATCHES = 3  # that the time of an epoch is taken from
_COPIES = 5  # of the weights while training: themselves, their gradients, two moments and the teacher's


def plan(
    model: nn.Module,
    data: Data,
    budget: Budget | str,
    trials: int = 12,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = lambda message, done: None,
    device_command: str | None = None,
) -> dict[str, Any]:
    """Return what `compress` would start with for a budget: costs of the untrained candidate, and the time it would take.

    Args:
        model: the trained model; it is not changed.
        data: as for `compress`.
        budget: limits.
        trials: most candidates that would be trained.
        seed: of every random draw.
        device: where training would run.
        progress: called with a message and the share done.
        device_command: times an exported file where it shall run, as for `compress`.

    Returns:
        `feasible`, whether every limit but the drop is met by the untrained candidate; `limits`, one row each; `recipe`;
        `seconds` of one trial, and at most; `memory_bytes`, of weights, gradients, moments and teacher, activations not counted.

    Raises:
        BudgetError: the size is below that of a file without information.
        DataError, ModelError, RecipeError: as of `compress`.
    """
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    together.refuse("plan", "it trains nothing, so start it alone")
    clock = find_clock(device_command, DEFAULT, wanted)
    request = Request(wanted, None, trials, seed, find_device(device), None, False, None, clock=clock)
    job = Job.start(model, data, None, request, progress)
    try:
        return _planned(Candidates(job), trials)
    finally:
        job.tidy()


def _planned(candidates: Candidates, trials: int) -> dict[str, Any]:
    job, budget = candidates.job, candidates.budget
    begin = time.perf_counter()
    strength = candidates.first_strength()
    if job.data.train is None:  # else it takes trainings to know
        _, strength = candidates.contest.winner(strength)
    costs = candidates.cheap(strength)
    untrained = (time.perf_counter() - begin) / max(1, len(candidates.priced))
    rows = []
    for limit in budget.limits:
        allowed = limit.allowed(candidates.costs.get(limit.metric, job.score.value))
        found = costs.get(limit.metric)
        met = None if found is None else found <= allowed  # what training alone can tell
        rows.append({"limit": str(limit), "allowed": allowed, "untrained": found, "met": met})
    epoch = _epoch_seconds(job) if job.data.train is not None else 0.0
    trial = epoch * strength.healing.total if epoch else untrained
    short = epoch * strength.shorter().healing.total
    comparing = epoch * candidates.contest.epochs(strength)
    most = 1 if budget.limit("drop") is None else trials
    spared = candidates.spared(strength)
    return {
        "feasible": all(row["met"] is not False for row in rows),
        "limits": rows,
        "recipe": str(candidates.contest.recipe(strength, next(iter(MIXES)))),
        "seconds": {
            "epoch": round(epoch, 2),
            "trial": round(trial),
            "least": round(comparing + (short if spared else trial)),
            "most": round(comparing + most * (trial + short * spared)),
        },
        "memory_bytes": _COPIES * job.before.size_bytes,
    }


def _epoch_seconds(job: Job) -> float:
    """What an epoch takes, from a few batches of training a copy."""
    loader: Any = job.data.train
    some, validate = list(islice(iter(loader), _BATCHES)), list(islice(iter(job.data.validate or ()), 1))
    few = dataclasses.replace(job.data, train=some, validate=validate)
    copied = copy.deepcopy(job.model).to(job.request.device)
    context = Context(data=few, teacher=job.teacher, device=job.request.device, seed=job.request.seed)
    start = time.perf_counter()
    fit(copied, context, Training(1, 0.0))
    spent = time.perf_counter() - start
    steps = len(loader) if hasattr(loader, "__len__") else sum(1 for _ in loader)
    return spent * max(1.0, steps / max(1, len(some)))
