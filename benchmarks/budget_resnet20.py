"""How long a full `compress` of ResNet-20 on CIFAR-10 (JPEG copy) takes under a size budget, on two cores.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/budget_resnet20.py

Everything that a first user waits for counts: damage tables, the comparison of mixes, the training, and the proof in a fresh process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

import torch
from cifar import task
from results import record

from featherweight import compress

NAME = "budget_resnet20"
BUDGET = "size<=6%"
CORES = 2


def main() -> None:
    """Compress, and write the row."""
    torch.set_num_threads(CORES)
    made = task("resnet20")
    start = time.perf_counter()

    def say(message: str, share: float) -> None:
        sys.stderr.write(f"{time.perf_counter() - start:5.0f} s  {message} {share:.0%}\n")

    with tempfile.TemporaryDirectory() as nothing_kept:
        os.environ["XDG_CACHE_HOME"] = nothing_kept  # so that tables of an earlier run are not read
        artifact = compress(made.model, made.data, BUDGET, name="resnet20", progress=say)
    minutes = (time.perf_counter() - start) / 60
    before, after, verdict = (getattr(artifact.report, name) for name in ("before", "after", "verdict"))
    note = (
        f"{BUDGET}, {CORES} threads, default settings, {len(artifact.report.trials)} trial: {before['size_bytes']:,} to "
        f"{after['size_bytes']:,} bytes, test accuracy {before['score']:.4f} to {after['score']:.4f}, "
        f"a drop of {100 * (before['score'] - after['score']):.2f} points; {verdict['text']}"
    )
    record(NAME, "budget.resnet20.minutes", round(minutes, 2), 1, note, {"recipe": artifact.report.recipe})


if __name__ == "__main__":
    main()
