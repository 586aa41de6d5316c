"""Five ways to zero weights, at four sparsities, on a CNN, an LSTM and a Transformer: accuracy before and after one heal.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_unstructured.py [cnn] [lstm] [transformer]

Every cell heals for the same number of epochs on the same batches with the original as teacher; movement pruning, which
prunes while it trains, trains for as long and has no accuracy before. A cell that is done is kept, so the script may be
stopped and started again, and run for one family at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from originals import original
from results import keep, kept, record
from torch import nn

from featherweight import Context, Data
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.tasks import mnist
from featherweight.technique import Technique
from featherweight.techniques import Distill, PruneMovement, PruneSparseGpt, PruneWanda, PruneWeights
from featherweight.techniques.train import Training

NAME = "pruning_unstructured"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Family:
    """A trained network, its data with a training part that is quick to heal on, how long to heal, and calibration batches."""

    model: nn.Module
    data: Data
    epochs: int
    learning_rate: float
    batches: int = 16


def cnn() -> Family:
    """LeNet-5-Caffe on MNIST; heals on 12,800 images."""
    whole = mnist.data()
    training = Training(epochs=12, learning_rate=1e-3, weight_decay=5e-2)
    model = original("lenet5", 0, mnist.lenet5, whole, training)
    return Family(model, replace(whole, train=_first(whole.train, 100)), epochs=3, learning_rate=1e-3)


def lstm() -> Family:
    """The two LSTM layers of `speech.py` on spoken digits; heals on all of them."""
    from speech import task

    made = task()
    return Family(made.model, made.data, epochs=3, learning_rate=1e-3)


def transformer() -> Family:
    """MiniLM of `sentiment.py` on SST-2; heals on 384 sentences, calibrates and validates on 128, tests on the first 448 of dev."""
    from sentiment import shortened, task

    made = task()
    calibrate = [shortened(batch) for batch in made.data.calibrate or ()]
    data = replace(
        made.data,
        train=_first(made.data.train, 12),
        calibrate=calibrate,
        validate=list(islice(made.data.validate or (), 2)),
        test=list(islice(made.data.test or (), 7)),
    )
    return Family(made.model, data, epochs=1, learning_rate=1e-4, batches=4)


FAMILIES: dict[str, Callable[[], Family]] = {"cnn": cnn, "lstm": lstm, "transformer": transformer}
METHODS: dict[str, Callable[[float, Family], Technique]] = {
    "magnitude": lambda ratio, _: PruneWeights(ratio, "global"),
    "lamp": lambda ratio, _: PruneWeights(ratio, "lamp"),
    "wanda": lambda ratio, f: PruneWanda(ratio, batches=f.batches),
    "sparsegpt": lambda ratio, f: PruneSparseGpt(ratio, batches=f.batches),
    "movement": lambda ratio, f: PruneMovement(ratio, epochs=f.epochs, learning_rate=f.learning_rate),
}


def main() -> None:
    """Measure the cells that are missing in the families asked for, and write the row."""
    done = kept(NAME)
    for name in sys.argv[1:] or FAMILIES:
        family = FAMILIES[name]()
        done[name] = {"original": evaluate(family.model, family.data, "test").value, **done.get(name, {})}
        for method in METHODS:
            for sparsity in SPARSITIES:
                key = f"{method} {sparsity:.0%}"
                if key not in done[name]:
                    done[name][key] = cell(family, method, sparsity)
                    sys.stderr.write(f"{name} {key}: {done[name][key]}\n")
                    keep(NAME, done)
    count = sum(len(rows) - 1 for rows in done.values())
    best = "; ".join(
        f"{name} (original {rows['original']:.4f}) " + ", ".join(f"{s:.0%}: {_best(rows, s)}" for s in SPARSITIES)
        for name, rows in done.items()
        if len(rows) == 1 + len(METHODS) * len(SPARSITIES)
    )
    note = f"best test accuracy after the heal, one seed: {best}; the whole table in details"
    table = [
        {"network": name, "cell": cell, "before the heal": row.get("before", ""), "after it": row["after"]}
        for name, rows in done.items()
        for cell, row in rows.items()
        if cell != "original"
    ]
    record(NAME, "pruning.unstructured.cells", count, 1, note, {"table": table})


def cell(family: Family, method: str, sparsity: float) -> dict[str, Any]:
    """Prune, evaluate, heal, evaluate; the share of zeros is counted in the healed network."""
    technique, model, context = METHODS[method](sparsity, family), family.model, _context(family)
    before = None
    if not technique.needs & {"train"}:
        model, _ = run(technique, model, context)
        before = evaluate(model, family.data, "test").value
        technique = Distill(epochs=family.epochs, learning_rate=family.learning_rate)
    healed, _ = run(technique, model, context)
    weights = [healed.get_parameter(name) for name in context.sparse]
    return {
        "before": before,
        "after": evaluate(healed, family.data, "test").value,
        "zeros": round(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights), 4),
    }


def _context(family: Family) -> Context:
    return Context(data=family.data, teacher=family.model, seed=0)


def _first(loader: Any, count: int) -> list[Any]:
    """Return the first batches of a loader in the order of seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [batch for _, batch in zip(range(count), loader, strict=False)]


def _best(rows: dict[str, Any], sparsity: float) -> str:
    found = {method: rows[f"{method} {sparsity:.0%}"]["after"] for method in METHODS}
    method = max(found, key=lambda name: found[name])
    return f"{found[method]:.4f} {method}"


if __name__ == "__main__":
    main()
