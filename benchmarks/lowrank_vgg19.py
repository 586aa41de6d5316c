"""VGG-19 on CIFAR-10 (JPEG copy) by low rank alone, float32 factors: bytes of the file and milliseconds.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/lowrank_vgg19.py

Whitened factors that keep several shares of each layer's output energy, as they are and healed by one epoch with the original as
teacher. Which of them counts is chosen on validation data, or the mildest where none is good enough there (the original was trained
on those images too); then test data is read once a figure. At most one point may be lost for speed. For the row that SlimNets (2018)
reports as 2.43 times smaller and not faster nothing may be: the 95 % interval of the paired difference holds zero, and the logits'
signal-to-noise ratio is at least 25 dB. Norms are folded in the network as it is too, and both run on ONNX Runtime in turn. A share
that is done is kept; a killed healing goes on.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from cifar import task
from originals import cache
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Data, Recipe, Task, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.data import batches
from featherweight.latency import latencies
from featherweight.measurement import structure
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, FoldBatchNorm, LowRank

NAME = "lowrank_vgg19"
SHARES = (0.9995, 0.999, 0.997, 0.995, 0.99, 0.98)
HEALED = (0.995, 0.99, 0.98)
HEAL = Distill(epochs=1, learning_rate=3e-4)
LIKE = 25.0  # dB at which networks count as alike
MARGIN = 0.1  # points that the choice keeps back from what may be lost


def factored(made: Task, share: float, heals: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network whose layers keep a share of their outputs' energy, and what it costs."""
    steps = Recipe((FoldBatchNorm(), LowRank(energy=share, method="whitened", batches=2), *([HEAL] if heals else [])))
    model = made.model.to(memory_format=torch.channels_last)
    context = Context(data=made.data, teacher=model, workspace=cache() / NAME / f"{share}", report=_say)
    small, edits = run(steps, model, context)
    size = len(package(small, edits, {}, export_graph(small, made.data)).to_bytes())
    return small, {"bytes": size, "macs": structure(small, made.data).macs}


def main() -> None:
    """Measure the shares, choose, time, and write the rows."""
    made, done = task("vgg19"), kept(NAME)
    if "dense" not in done:
        done["dense"] = {split: evaluate(made.model, made.data, split).value for split in ("validate", "test")}
        keep(NAME, done)
    dense, whole = done["dense"], original_bytes(made.model)
    ways = {
        **{f"{share}": (share, False) for share in SHARES},
        **{f"{share} healed": (share, True) for share in HEALED},
    }
    for name, (share, heals) in ways.items():
        if name not in done:
            small, costs = factored(made, share, heals)
            done[name] = {**costs, "validate": evaluate(small, made.data, "validate").value}
            keep(NAME, done)
        sys.stderr.write(f"{name}: {done[name]}\n")
    for allowed, cost, rows in ((1.0, "macs", ("vgg19.speed",)), (0.0, "bytes", ("slimnets.ratio", "slimnets.speed"))):
        fits = [name for name in ways if dense["validate"] - done[name]["validate"] <= max(allowed - MARGIN, 0.0) / 100]
        name = min(fits, key=lambda name: done[name][cost]) if fits else str(SHARES[0])
        small, costs = factored(made, *ways[name])
        lost, margin, quality = difference(made.model, small, made.data)
        holds = lost <= allowed or (lost - margin <= allowed == 0 and quality >= LIKE)
        gain, told = speed(made.model, small, made.data)
        note = (
            f"{name} of the energy of each layer's outputs kept, "
            f"{'chosen on validation data' if fits else 'the mildest, as none was good enough on validation data'} for at most "
            f"{allowed} points lost; {lost:.2f} +- {margin:.2f} points lost on test ({100 * dense['test']:.2f} before; paired, 95 %), "
            f"logits at {quality:.1f} dB; {told}; {costs['bytes']:,} bytes of "
            f"{whole:,}, {costs['macs']:,} multiply-adds; whitened factors; healed is one epoch with the original as teacher"
        )
        for row in rows:
            got = gain if row.endswith("speed") else whole / costs["bytes"]
            # what was chosen on validation data may still lose more on test data, and then it does not count
            record(NAME, f"lowrank.{row}", round(got, 2) if holds else None, 1, note, done)


def difference(before: nn.Module, after: nn.Module, data: Data) -> tuple[float, float, float]:
    """Return the points lost on test data, half the 95 % interval of the paired difference, and the logits' SQNR in dB."""
    hits: list[Tensor] = []
    signal = noise = 0.0
    with torch.no_grad():
        for inputs, labels in batches(data.test, "test"):
            wanted, given = before(inputs), after(inputs)
            hits.append((wanted.argmax(1) == labels).double() - (given.argmax(1) == labels).double())
            signal += float(wanted.double().square().sum())
            noise += float((given - wanted).double().square().sum())
    every = torch.cat(hits)
    return 100 * float(every.mean()), 196 * float(every.std()) / len(every) ** 0.5, 10 * math.log10(signal / noise)


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


def _say(message: str, _: float) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
