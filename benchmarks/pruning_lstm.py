"""LSTM on spoken digits: half of the hidden units of both layers removed and healed; accuracy and time on ONNX Runtime.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_lstm.py
"""

from __future__ import annotations

import statistics
import sys

from results import keep, kept, record
from speech import SEEDS, task

from featherweight import Context, Recipe, run
from featherweight.latency import latencies
from featherweight.measurement import structure
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, PruneChannels

NAME = "pruning_lstm"
RECIPE = Recipe((PruneChannels(ratio=0.5, importance="taylor"), Distill(epochs=12, learning_rate=2e-3)))


def main() -> None:
    """Measure every seed, time the last pair, and write the rows."""
    done = kept(NAME)
    for seed in SEEDS:
        made = task(seed)
        original = made.model
        small = run(RECIPE, original, Context(data=made.data, teacher=original, seed=seed, report=_say)).model
        models = {"original": original, "small": small}
        done[str(seed)] = {name: evaluate(model, made.data, "test").value for name, model in models.items()}
        done[str(seed)] |= {f"{name} parameters": structure(model, made.data).params for name, model in models.items()}
        sys.stderr.write(f"seed {seed}: {done[str(seed)]}\n")
        keep(NAME, done)
    exported = {name: assemble(export_graph(model, made.data), model.state_dict()) for name, model in models.items()}
    timed = latencies(exported, made.data, seconds=5.0)
    before, after = timed["original"], timed["small"]
    drops = [100 * (row["original"] - row["small"]) for row in done.values()]
    sizes = [f"{row['original parameters']:,} to {row['small parameters']:,}" for row in done.values()]
    told = ", ".join(f"{100 * row['original']:.2f} to {100 * row['small']:.2f}" for row in done.values())
    note = f"test accuracy by seed: {told} (300 recordings); 2 x 256 to 2 x 128 hidden units, parameters {sizes[0]}"
    record(NAME, "pruning.lstm.half.drop", round(statistics.mean(drops), 2), len(drops), note, done)
    note = (
        f"ONNX Runtime, 1 thread, batch 1, {after.runs} interleaved calls: {before.median * 1e3:.3f} ms ({before.low * 1e3:.3f} "
        f"to {before.high * 1e3:.3f}) against {after.median * 1e3:.3f} ms ({after.low * 1e3:.3f} to {after.high * 1e3:.3f})"
    )
    record(NAME, "pruning.lstm.half.speed", round(before.median / after.median, 2), 1, note)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
