"""VGG-19 on CIFAR-10 (JPEG copy) by low rank alone, float32 factors, no training: bytes of the file and milliseconds.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/lowrank_vgg19.py

Whitened factors that keep several shares of each layer's output energy; the share is chosen on validation data, then test data
is read once a figure: at most one point lost for speed, and nothing lost for the row that SlimNets (2018) reports as 2.43
times smaller and not faster. Norms are folded in the network as it is too, and both run on ONNX Runtime in turn.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from cifar import task
from results import keep, kept, record
from torch import nn

from featherweight import Context, Data, Recipe, Task, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.latency import latencies
from featherweight.measurement import structure
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import FoldBatchNorm, LowRank

NAME = "lowrank_vgg19"
SHARES = (0.999, 0.997, 0.995, 0.99, 0.98, 0.97, 0.95)
MARGIN = 0.1  # points that the choice keeps back from what may be lost


def factored(made: Task, share: float) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network whose layers keep a share of their outputs' energy, and what it costs."""
    steps = Recipe((FoldBatchNorm(), LowRank(energy=share, method="whitened", batches=2)))
    small, edits = run(steps, made.model, Context(data=made.data, teacher=made.model))
    size = len(package(small, edits, {}, export_graph(small, made.data)).to_bytes())
    return small, {"bytes": size, "macs": structure(small, made.data).macs}


def main() -> None:
    """Measure the shares, choose, time, and write the rows."""
    torch.set_num_threads(1)
    made, done = task("vgg19"), kept(NAME)
    if "dense" not in done:
        done["dense"] = {split: evaluate(made.model, made.data, split).value for split in ("validate", "test")}
        keep(NAME, done)
    dense = done["dense"]
    whole = original_bytes(made.model)
    for share in SHARES:
        if str(share) not in done:
            small, costs = factored(made, share)
            done[str(share)] = {**costs, "validate": evaluate(small, made.data, "validate").value}
            keep(NAME, done)
        sys.stderr.write(f"{share}: {done[str(share)]}\n")
    for allowed, rows in ((1.0, ("vgg19.speed",)), (0.0, ("slimnets.ratio", "slimnets.speed"))):
        share = chosen(done, dense["validate"], allowed)
        if share is None:
            for row in rows:
                record(NAME, f"lowrank.{row}", None, 1, f"no share of {SHARES} loses at most {allowed} points", done)
            continue
        small, costs = factored(made, share)
        lost = 100 * (dense["test"] - evaluate(small, made.data, "test").value)
        gain, told = speed(made.model, small, made.data)
        note = (
            f"{share:.1%} of the energy of each layer's outputs kept, chosen on validation data for at most {allowed} points lost; "
            f"{lost:.2f} points lost on test ({100 * dense['test']:.2f} before); {told}; {costs['bytes']:,} bytes of "
            f"{whole:,}, {costs['macs']:,} multiply-adds; whitened factors, no training"
        )
        for row in rows:
            got = gain if row.endswith("speed") else whole / costs["bytes"]
            record(NAME, f"lowrank.{row}", round(got, 2), 1, note, done)


def chosen(done: dict[str, Any], before: float, allowed: float) -> float | None:
    """Return the smallest share that loses at most `allowed` points, less a margin, on validation data, or None."""
    most = max(allowed - MARGIN, 0.0) / 100
    fits = [share for share in SHARES if before - done[str(share)]["validate"] <= most]
    return min(fits, default=None)


def speed(before: nn.Module, after: nn.Module, data: Data) -> tuple[float, str]:
    """Return how many times as fast the network has become on ONNX Runtime, one thread, batch 1, and the milliseconds."""
    folded = run(FoldBatchNorm(), before, Context(data=data)).model
    exported = {
        name: assemble(export_graph(model, data), model.state_dict())
        for name, model in (("dense", folded), ("small", after))
    }
    timed = latencies(exported, data, seconds=10.0)
    told = ", ".join(
        f"{name} {t.median * 1e3:.2f} ms ({t.low * 1e3:.2f} to {t.high * 1e3:.2f})" for name, t in timed.items()
    )
    return timed["dense"].median / timed["small"].median, told


if __name__ == "__main__":
    main()
