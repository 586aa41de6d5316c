"""LSTM on spoken digits by low rank, pruning, quantization and distillation together: 15 and 40 times smaller, and faster.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/lstm_combined.py

Size is the whole file's, graph and all, over the float32 weights; accuracy is that of the file loaded back. Time is of the file's
graph on ONNX Runtime against the original in PyTorch eager and on ONNX Runtime, all in turn.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from originals import cache
from results import keep, kept, record
from speech import SEEDS, task
from torch import nn

import featherweight
from featherweight import Context, Recipe, Task, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.latency import latencies
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, FactorRecurrent, PruneChannels, QuantizeWeights

NAME = "lstm_combined"
POINTS = {"15x": 15, "40x": 40}
STEPS = {  # share of hidden units cut, of the rest's parameters factored away, and bits
    "15x": (0.5, 0.3, 6),
    "40x": (0.6, 0.3, 4),
}


def recipe(point: str) -> Recipe:
    """Return the steps of one point: cut and heal, factor, quantize, and heal as quantized."""
    units, rank, bits = STEPS[point]
    return Recipe(
        (
            PruneChannels(ratio=units, importance="taylor"),
            Distill(epochs=12, learning_rate=2e-3),
            FactorRecurrent(ratio=rank, rank="spread", hidden="factors"),
            Distill(epochs=6, learning_rate=1e-3),
            QuantizeWeights(bits=bits),
            Distill(epochs=8, learning_rate=5e-4),
        )
    )


def compressed(made: Task, point: str, seed: int) -> dict[str, Any]:
    """Return what one seed gives at one point; the file stays in the benchmarks' cache."""
    context = Context(data=made.data, teacher=made.model, seed=seed, report=_say)
    small, edits = run(recipe(point), made.model, context)
    artifact = package(small, edits, {}, export_graph(small, made.data))
    size = artifact.save(place(point, seed))
    loaded: nn.Module = featherweight.load(place(point, seed), into=made.model)
    return {
        "original": evaluate(made.model, made.data, "test").value,
        "compressed": evaluate(loaded, made.data, "test").value,
        "bytes": size,
        "ratio": original_bytes(made.model) / size,
        "parts": artifact.bytes_by_part(),
    }


def place(point: str, seed: int) -> Path:
    """Return where the file of a point and seed is kept."""
    return cache() / f"{NAME}-{point}-{seed}.fw"


def main() -> None:
    """Measure every point and seed, time the smaller one, and write the rows."""
    done = kept(NAME)
    for point in POINTS:
        for seed in SEEDS:
            made, key = task(seed), f"{point}, seed {seed}"
            if key not in done or not place(point, seed).exists():
                done[key] = compressed(made, point, seed)
                keep(NAME, done)
            _say(f"{key}: {done[key]}", 1.0)
        _row(point, [done[f"{point}, seed {seed}"] for seed in SEEDS])
    exported = assemble(export_graph(made.model, made.data), made.model.state_dict())
    small = featherweight.load(place("40x", SEEDS[-1])).onnx_bytes()
    timed = latencies({"eager": made.model, "onnxruntime": exported, "compressed": small}, made.data, seconds=5.0)
    told = ", ".join(
        f"{name} {t.median * 1e3:.3f} ms ({t.low * 1e3:.3f} to {t.high * 1e3:.3f})" for name, t in timed.items()
    )
    note = f"the 40x file on ONNX Runtime against the original in PyTorch eager, 1 thread, batch 1, in turn: {told}"
    record(NAME, "lstm.combined.speed", round(timed["eager"].median / timed["compressed"].median, 2), 1, note)


def _row(point: str, rows: list[dict[str, Any]]) -> None:
    drop = statistics.mean(100 * (row["original"] - row["compressed"]) for row in rows)
    told = ", ".join(
        f"{100 * row['original']:.2f} to {100 * row['compressed']:.2f} in {row['bytes']:,} bytes ({row['ratio']:.1f}x)"
        for row in rows
    )
    least = min(row["ratio"] for row in rows)
    note = f"test accuracy by seed (300 recordings): {told}; {recipe(point)}"
    if least < POINTS[point]:
        record(NAME, f"lstm.{point}.drop", None, len(rows), f"only {least:.1f} times smaller: {note}", rows)
    else:
        record(NAME, f"lstm.{point}.drop", round(drop, 2), len(rows), note, rows)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
