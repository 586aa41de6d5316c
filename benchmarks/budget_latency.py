"""Budgets of milliseconds, relative to the original: is the first allocation fast enough, and is the corrected one.

    python benchmarks/budget_latency.py [resnet20 lstm mlp]

Weights and inputs are random and nothing is trained, which changes no time. An artifact is timed anew beside the original, for
the verdict as `compress` takes it: what the search has read from its latency table does not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from networks import resnet
from results import keep, kept, record
from speech import BANDS, FRAMES, Recogniser
from torch import nn

from featherweight import Data
from featherweight.budget import Budget
from featherweight.candidates import Candidates
from featherweight.job import Job
from featherweight.latency import latencies
from featherweight.mixes import MIXES
from featherweight.portable import assemble
from featherweight.preflight import Request
from featherweight.search import Strength, first_strength

NAME = "budget_latency"
RUNTIMES = ("onnxruntime", "openvino")
BATCH, BATCHES = 32, 4


def mlp() -> nn.Module:
    """Return a network for 28 x 28 images with two hidden layers of 2048.

    Of 512, the call itself takes 0.22 of the time in ONNX Runtime and 0.36 in OpenVINO, and no network keeps a fifth of it.
    """
    layers = [nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)]
    return nn.Sequential(*layers).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[float, ...]]] = {
    "resnet20": (lambda: resnet(20), (3, 32, 32), (0.75, 0.6, 0.5, 0.45, 0.42)),
    "lstm": (lambda: Recogniser().eval(), (FRAMES, BANDS), (0.75, 0.6, 0.5, 0.4, 0.33)),
    "mlp": (mlp, (1, 28, 28), (0.75, 0.5, 0.33, 0.25, 0.2)),
}
"""What builds a network, the shape of a sample, and shares of the original's milliseconds."""


def main() -> None:
    """Try every budget of the networks named on the command line, all by default, and write both rows."""
    torch.set_num_threads(1)
    done = kept(NAME)
    for name in sys.argv[1:] or NETWORKS:
        for runtime in RUNTIMES:
            if f"{name} {runtime}" not in done:
                done[f"{name} {runtime}"] = _tried(name, runtime)
                keep(NAME, done)
    _rows(done)


def _tried(name: str, runtime: str) -> list[dict[str, Any]]:
    """One row a budget, all from the same tables."""
    build, shape, shares = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    batches = [(torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))) for _ in range(BATCHES)]
    data = Data(example=batches[0][0][:1], train=batches, calibrate=batches, validate=batches, test=batches)
    request = Request(
        Budget.parse("latency<=100%"), None, 1, 0, torch.device("cpu"), None, False, None, runtime=runtime
    )
    job = Job.start(model, data, None, request, lambda message, done: None)
    begin = time.perf_counter()
    candidates = Candidates(job)
    spent = time.perf_counter() - begin
    rows = []
    for share in shares:
        asked: list[Strength] = []

        def cheap(strength: Strength, asked: list[Strength] = asked) -> dict[str, float]:
            asked.append(strength)
            return candidates.cheap(strength)

        first_strength(Budget.parse(f"latency<={share:.0%}"), candidates.costs, cheap, 1, candidates.integers)
        first, last = (_measured(candidates, strength) for strength in (asked[0], asked[-1]))
        row = {"share": share, "first": first, "last": last, "tries": len(asked), "seconds": round(spent, 1)}
        sys.stderr.write(f"{name} {runtime} {row}\n")
        rows.append(row)
    job.tidy()
    return rows


def _measured(candidates: Candidates, strength: Strength) -> tuple[float, float]:
    """The artifact's milliseconds over the original's, timed in turn: of lower quartiles, and of medians."""
    job = candidates.job
    result = job.execute(
        candidates.contest.recipe(strength, next(iter(MIXES)), trains=False), by_user=False, measure=False
    )
    models = {"original": candidates.whole, "artifact": assemble(result.graph, result.model.state_dict())}
    timed = latencies(models, job.data, runtime=job.request.runtime)
    small, large = timed["artifact"], timed["original"]
    return round(small.low / large.low, 4), round(small.median / large.median, 4)


def _rows(done: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for found in done.values() for row in found]
    missing = [f"{name} {runtime}" for name in NETWORKS for runtime in RUNTIMES if f"{name} {runtime}" not in done]
    for figure, key in (("first_try", "first"), ("final", "last")):
        by_quartile, met = (sum(row[key][which] <= row["share"] for row in rows) for which in (0, 1))
        told = "; ".join(
            f"{name}: " + ", ".join(f"{row[key][1]:.2f} of {row['share']:.2f}" for row in found)
            for name, found in done.items()
        )
        note = (
            f"{met} of {len(rows)} by medians, {by_quartile} by lower quartiles, which hold where other processes share the core; one "
            f"thread; milliseconds over the original's and what was allowed: {told}; the mlp has hidden layers of 2048, since of 512, "
            "which an earlier run had, the call itself takes more than some budgets"
            f"{'; not measured: ' if missing else ''}{', '.join(missing)}"
        )
        record(NAME, f"budget.latency.{figure}", round(met / len(rows), 3), 1, note)


if __name__ == "__main__":
    main()
