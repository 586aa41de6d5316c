"""Time of a linear layer as a product of small tensors over that of the dense one: one thread, batch 1 and 32, called in turn.

    python benchmarks/lowrank_structured.py

Needs the extras `bench` and `openvino`, and a quiet machine. Layers of 256 to 2,048 wide in float32, each form with an eighth of the
weights; of the exported graphs in ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import torch
from results import record
from torch import nn

from featherweight import Context, Data, run
from featherweight.latency import one_thread, paired_ratio, prepared, rounds
from featherweight.portable import assemble, export_graph
from featherweight.techniques import FactorTensors

NAME = "lowrank_structured"
FORMS = ("kronecker", "tensor_train", "groups", "circulant")
WIDTHS = (256, 512, 1024, 2048)
SIZES = (1, 32)
RUNTIMES = ("onnxruntime", "openvino")
RATIO = 1 - 1 / 8
SECONDS = 0.5  # on each call


def measured(width: int, size: int, runtime: str) -> dict[str, float]:
    """Return the time of each form over that of the dense layer."""
    torch.manual_seed(0)
    dense, inputs = nn.Sequential(nn.Linear(width, width)).eval(), torch.randn(size, width)
    data = Data(example=inputs[:1], loss="mse")
    models: dict[str, nn.Module] = {"dense": dense}
    for form in FORMS:
        models[form], edits = run(FactorTensors(form=form, ratio=RATIO), dense, Context(data=data))
        if not edits:
            raise RuntimeError(f"{width} wide: nothing took the form {form}")
    calls: dict[str, Callable[[], object]] = {
        name: prepared(assemble(export_graph(model, data), model.state_dict()), inputs, runtime)
        for name, model in models.items()
    }
    with one_thread(), torch.inference_mode():
        times = rounds(calls, SECONDS)
    return {form: round(paired_ratio(times[form], times["dense"])[0], 2) for form in FORMS}


def main() -> None:
    """Measure every width, batch and runtime, and write a row for each form: the mean of its ratios."""
    found: dict[str, dict[str, float]] = {}
    for width, size, runtime in itertools.product(WIDTHS, SIZES, RUNTIMES):
        found[f"{width} wide, {size} samples, {runtime}"] = measured(width, size, runtime)
        sys.stderr.write(f"{width} {size} {runtime}: {found[f'{width} wide, {size} samples, {runtime}']}\n")
    for form in FORMS:
        each = {key: ratios[form] for key, ratios in found.items()}
        spans = {width: [ratio for key, ratio in each.items() if key.startswith(f"{width} ")] for width in WIDTHS}
        told = "; ".join(f"{width} wide {min(own):g} to {max(own):g}" for width, own in spans.items())
        mean = math.exp(sum(map(math.log, each.values())) / len(each))
        note = (
            f"its milliseconds over the dense layer's, geometric mean over widths, {' and '.join(map(str, SIZES))} samples, "
            f"{' and '.join(RUNTIMES)}, float32, {1 - RATIO:.3g} of the weights: {told}"
        )
        record(NAME, f"lowrank.structured.{form}.time", round(mean, 2), 1, note, each)


if __name__ == "__main__":
    main()
