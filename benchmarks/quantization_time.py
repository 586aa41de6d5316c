"""Wall time of post-training int8, ours and NNCF's, of the same network on the same calibration samples, in turn.

    python benchmarks/quantization_time.py [resnet18_224 encoder]

Needs the extras `bench` and `openvino`. Ours starts from the PyTorch module and ends with it: norms folded, ranges read, weights
rounded, the guard's check. NNCF's is `nncf.quantize` on the OpenVINO model, its conversion not counted.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import nncf
import openvino
import torch
from networks import random_network
from results import record

from featherweight import Context, Data, Recipe, run
from featherweight.runtimes.protocol import quiet
from featherweight.techniques import FoldBatchNorm, QuantizeStatic

NAME = "quantization_time"
ROUNDS = 3
RECIPES = {"resnet18_224": Recipe((FoldBatchNorm(), QuantizeStatic())), "encoder": Recipe((QuantizeStatic(),))}


def measure(name: str) -> dict[str, list[float]]:
    """Return the seconds of each round, ours and NNCF's."""
    model, noise = random_network(name)
    data = Data(example=noise[0][:1], calibrate=[(batch, batch) for batch in noise], loss="mse")
    some = [one.numpy() for batch in noise for one in batch.split(1)]
    seconds: dict[str, list[float]] = {"ours": [], "nncf": []}
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(RECIPES[name], model, Context(data=data))
        seconds["ours"].append(time.perf_counter() - started)
        with quiet():
            network: Any = openvino.convert_model(model, example_input=noise[0][:2])
            network.reshape([-1, *noise[0].shape[1:]])
            started = time.perf_counter()
            nncf.quantize(network, nncf.Dataset(some), subset_size=len(some))
            seconds["nncf"].append(time.perf_counter() - started)
        sys.stderr.write(f"{name}: {seconds}\n")
    return seconds


def main() -> None:
    """Measure the networks, and write their rows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or list(RECIPES):
        seconds = measure(name)
        best = {side: min(values) for side, values in seconds.items()}
        told = ", ".join(f"{side} {' '.join(f'{value:.1f}' for value in values)} s" for side, values in seconds.items())
        note = f"the quickest of {ROUNDS} rounds in turn, 32 samples of noise, 1 thread of PyTorch: {told}; {RECIPES[name]}"
        record(NAME, f"quantization.{name}.time_over_nncf", round(best["ours"] / best["nncf"], 2), 1, note, seconds)


if __name__ == "__main__":
    main()
