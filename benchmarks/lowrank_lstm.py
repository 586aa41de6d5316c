"""LSTM on spoken digits by low rank alone, float32 factors: how much faster its file is on the best runtime at one point lost.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/lowrank_lstm.py

Whitened factors of several shares of the energy, the hidden matrices' first ones shared with the next layer, as they are and healed
by some epochs with the original as teacher. Of those that lose at most a point on validation data the one with the fewest
weights counts; then test data is read once. It and the original are timed in turn, each on ONNX Runtime and OpenVINO and in
PyTorch eager, at one sample and at 32, on one thread; the ratio is that of their best runtimes at one sample. A time is the mean of
the fastest quarter of its rounds, since whatever else the machine does only ever adds to them. A factored file is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from originals import cache
from results import keep, kept, record
from speech import task
from torch import Tensor, nn

import featherweight
from featherweight import Context, Recipe, Task, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.data import batches
from featherweight.latency import one_thread, prepared, rounds, summary
from featherweight.portable import assemble, export_graph
from featherweight.runtimes import find_runtime, installed
from featherweight.runtimes.protocol import fastest_quarter
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, FactorRecurrent

NAME = "lowrank_lstm"
SEED = 0
WAYS = {  # share of the energy, and epochs of healing
    "0.995": (0.995, 0),
    "0.98": (0.98, 0),
    "0.98 healed": (0.98, 6),
    "0.95 healed": (0.95, 12),
}
MULTIPLE = 8  # of ranks: what a vector register holds
ALLOWED, MARGIN = 1.0, 0.5  # points that may be lost, and that the choice keeps back: 300 recordings decide it
RUNTIMES = ("onnxruntime", "openvino")
BATCHES = (1, 32)


def recipe(name: str) -> Recipe:
    """Return the steps of one way."""
    share, epochs = WAYS[name]
    low = FactorRecurrent(energy=share, hidden="shared", multiple=MULTIPLE)
    return Recipe((low, *([Distill(epochs=epochs, learning_rate=1e-3)] if epochs else [])))


def place(name: str) -> Path:
    """Return where the file of a way is kept."""
    return cache() / f"{NAME}-{name.replace(' ', '-')}-{SEED}.fw"


def factored(made: Task, name: str) -> dict[str, Any]:
    """Write the file of a way, and return what it costs and its accuracy on validation data."""
    context = Context(data=made.data, teacher=made.model, seed=SEED, report=_say)
    small, edits = run(recipe(name), made.model, context)
    size = package(small, edits, {}, export_graph(small, made.data)).save(place(name))
    return {
        "ranks": [edits[0].options[key] for key in ("input_ranks", "hidden_ranks")],
        "bytes": size,
        "weights": sum(value.numel() for value in small.parameters()),
        "validate": evaluate(small, made.data, "validate").value,
    }


def main() -> None:
    """Factor, choose, time, and write the row."""
    made, done = task(SEED), kept(NAME)
    if "dense" not in done:
        done["dense"] = {split: evaluate(made.model, made.data, split).value for split in ("validate", "test")}
        keep(NAME, done)
    for name in WAYS:
        if name not in done or not place(name).exists():
            done[name] = factored(made, name)
            keep(NAME, done)
        sys.stderr.write(f"{name}: {done[name]}\n")
    lost = {name: 100 * (done["dense"]["validate"] - done[name]["validate"]) for name in WAYS}
    fits = [name for name in WAYS if lost[name] <= ALLOWED - MARGIN]
    name = min(fits, key=lambda one: (done[one]["weights"], lost[one])) if fits else next(iter(WAYS))
    artifact = featherweight.load(place(name))
    small = featherweight.load(place(name), into=made.model)
    points = 100 * (done["dense"]["test"] - evaluate(small, made.data, "test").value)
    gains, told, done["milliseconds"] = speed(made, small, artifact.onnx_bytes())
    keep(NAME, done)
    costs = done[name]
    note = (
        f"{name} of the energy of each matrix's outputs kept: input ranks {costs['ranks'][0]}, hidden ranks {costs['ranks'][1]}, "
        f"{'chosen on validation data' if fits else 'the mildest, as none was good enough on validation data'}; {points:.2f} points "
        f"lost on test ({100 * done['dense']['test']:.2f} before, 300 recordings); best runtime of each, at 32 samples "
        f"{gains[32]:.2f} times as fast; ms of a batch, one thread, in turn, mean of the fastest quarter and median: {told}; "
        f"{costs['weights']:,} weights, {costs['bytes']:,} bytes of {original_bytes(made.model):,}; {recipe(name)}"
    )
    # what was chosen on validation data may still lose more on test data, and then it does not count
    record(NAME, "lowrank.lstm.speed", round(gains[1], 2) if points <= ALLOWED else None, 1, note, done)


def speed(made: Task, small: nn.Module, file: bytes) -> tuple[dict[int, float], str, dict[str, Any]]:
    """Return how many times as fast the file is by batch, each on its best runtime, the milliseconds in words, and as data."""
    whole = assemble(export_graph(made.model, made.data), made.model.state_dict())
    frames, _ = next(iter(batches(made.data.test, "test")))
    gains, told, data = {}, [], {}
    for batch in BATCHES:
        inputs = frames[:batch].contiguous()
        calls: dict[str, Callable[[], object]] = {}
        for role, module, model in (("original", made.model, whole), ("factored", small, file)):
            calls[f"{role} eager"] = partial(_eager, module, inputs)
            for runtime in RUNTIMES:
                if installed(find_runtime(runtime)):
                    calls[f"{role} {runtime}"] = prepared(model, (inputs,), runtime)
        with one_thread(), torch.inference_mode():
            times = rounds(calls, seconds=10.0, most=20_000)
        best = {key: fastest_quarter(values) for key, values in times.items()}
        original, factors = (
            min(time for key, time in best.items() if key.startswith(role)) for role in ("original", "factored")
        )
        gains[batch] = original / factors
        data[f"batch {batch}"] = {
            key: {"fastest_quarter": best[key], **summary(values).to_dict()} for key, values in times.items()
        }
        lines = (f"{key} {1e3 * best[key]:.2f} ({1e3 * summary(times[key]).median:.2f})" for key in calls)
        told.append(f"batch {batch} {', '.join(lines)}")
    return gains, "; ".join(told), data


def _eager(model: nn.Module, inputs: Tensor) -> Any:
    return model(inputs)


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
