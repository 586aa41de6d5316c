"""MiniLM on SST-2: a third of the attention heads and of the hidden units of every layer removed, healed with the original.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_minilm.py
"""

from __future__ import annotations

import sys

from results import record
from sentiment import task

from featherweight import Context, Recipe, only, run
from featherweight.latency import latencies
from featherweight.measurement import structure
from featherweight.portable import assemble, export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, PruneChannels

NAME = "pruning_minilm"
LAYERS = ("*.attention.self", "*.intermediate")
CUT = only(LAYERS, PruneChannels(ratio=1 / 3, importance="taylor", reconstruct=True))
RECIPE = Recipe((CUT, Distill(epochs=1, learning_rate=1e-4)))


def main() -> None:
    """Cut, heal, measure, and write the row."""
    made = task()
    original = made.model
    context = Context(data=made.data, teacher=original, seed=0, report=_say)
    bare = run(CUT, original, context).model
    small = run(RECIPE, original, context).model
    models = {"original": original, "small": small}
    scores = {name: evaluate(model, made.data, "test").value for name, model in {**models, "cut": bare}.items()}
    params = {name: structure(model, made.data).params for name, model in models.items()}
    exported = {name: assemble(export_graph(model, made.data), model.state_dict()) for name, model in models.items()}
    timed = latencies(exported, made.data, seconds=5.0)
    before, after = timed["original"], timed["small"]
    config = small.get_submodule("encoder.encoder.layer.0")
    note = (
        f"test accuracy {100 * scores['original']:.2f}, after the cut {100 * scores['cut']:.2f}, after healing "
        f"{100 * scores['small']:.2f} (872 sentences); each layer keeps {config.attention.self.query.out_features} of 384 "
        f"attention channels (32 a head) and {config.intermediate.dense.out_features} of 1536 hidden units; parameters "
        f"{params['original']:,} to {params['small']:,}, of which 11.7 M are the word embedding; ONNX Runtime, 1 thread, batch 1, "
        f"{before.median * 1e3:.2f} ms against {after.median * 1e3:.2f} ms"
    )
    drop = 100 * (scores["original"] - scores["small"])
    record(NAME, "pruning.minilm.third.drop", round(drop, 2), 1, note, {"scores": scores, "parameters": params})


def _say(message: str, share: float) -> None:
    sys.stderr.write(f"{message} {share:.0%}\n")


if __name__ == "__main__":
    main()
