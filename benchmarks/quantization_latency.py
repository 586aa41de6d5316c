"""Milliseconds of our fastest form of a network beside PyTorch eager and six peers: one thread, batch 1 and 32, called in turn.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/quantization_latency.py [resnet18_32 resnet18_224 encoder lstm efficientnet]

Needs the extras `bench`, `openvino`, `litert` and `ao`, and a quiet machine. Ours is what `auto` takes: the network as int8
(`fold_batch_norm`, `quantize_static`) and as it was, on every runtime that agrees with PyTorch by at least 25 dB, or where no peer
comes so near in `quantization_ptq.py`, by what the best of them has; layers whose integer form is slower on its runtime are computed
with floats. Which one is decided as `auto` does, by a first round of calls, and by a second among the near ones, in which PyTorch eager
takes its turns as in the third, where the figures are from. What takes minutes to prepare is kept in the benchmarks' cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import efficientnet
import speech
import torch
from latency_peers import PEERS
from networks import RANDOM, random_network
from originals import cache
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Data, run
from featherweight.agreement import expected_outputs, signal_to_noise
from featherweight.artifact import load, package
from featherweight.data import batches, forward
from featherweight.delivery import Delivery, deliveries, subject, timed
from featherweight.errors import FeatherweightError
from featherweight.latency import one_thread, paired_ratio, rounds, summary
from featherweight.precision import settled
from featherweight.runtimes import RUNTIMES, Subject
from featherweight.techniques import FoldBatchNorm, QuantizeStatic

NAME = "quantization_latency"
NETWORKS = (*RANDOM, "lstm", "efficientnet")
SIZES = (1, 32)
SECONDS = 4.0  # on each call, in the last round
FLOAT = ("onnxruntime", "openvino", "openvino_bf16")  # where the network as it was is tried too
AT_LEAST = 25.0  # dB against the original
MEASURED = (
    "nncf",
    "onnxruntime",
    "torchao",
)  # peers whose int8 networks `quantization_ptq.py` compares with the original


def network(name: str) -> tuple[nn.Module, Data, Tensor]:
    """Return a network with its norms folded, data to calibrate on, and 32 samples."""
    if name in RANDOM:
        model, noise = random_network(name)
        data = Data(example=noise[0][:1], calibrate=[(batch, batch) for batch in noise], loss="mse")
        some = torch.cat(noise)[:32]
    else:
        made = speech.task() if name == "lstm" else efficientnet.task()
        model, data = made.model, made.data
        some = torch.cat([inputs for inputs, _ in batches(data.calibrate, "calibrate")])[:32]
    return run(FoldBatchNorm(), model.eval(), Context(data=data)).model, data, some.contiguous()


def int8(name: str, model: nn.Module, data: Data) -> nn.Module:
    """Return the network as int8, from the benchmarks' cache if it is there."""
    path = cache() / NAME / f"{name}.fw"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        small, edits = run(QuantizeStatic(), model, Context(data=data))
        package(small, edits, {}, None).save(path, graph=False)
    made: nn.Module = load(path, into=model)
    return made.eval()


def enough(name: str) -> float:
    """Return how near to the original ours must be, in dB."""
    cells = kept("quantization_ptq").get(name, {})
    peers = [cell["sqnr_db"] for peer, cell in cells.items() if peer in MEASURED and "sqnr_db" in cell]
    return min(AT_LEAST, max(peers, default=AT_LEAST))


def ours(name: str, model: nn.Module, data: Data, inputs: Tensor) -> list[Delivery]:
    """Return what `auto` has to choose from, timed: forms on runtimes that agree with the original, the fastest first."""
    small, folder = int8(name, model, data), cache() / NAME / name / str(len(inputs))
    wanted, made = expected_outputs(model, inputs), []
    every = [key for key, runtime in RUNTIMES.items() if runtime.auto and key != "torch"]
    for form, source, names in (("int8", small, every), ("float", model, FLOAT)):
        whole = subject(source, data)
        whole = Subject(whole.onnx, inputs, whole.program)
        expected = expected_outputs(source, inputs)
        found = deliveries(whole, names, folder / form, inputs, expected, source)
        for item in settled(whole, found, folder / form, inputs, expected, inputs, source):
            if item.program is None:
                sys.stderr.write(f"{name} {form} {item.runtime}: {item.reason}\n")
                continue
            given = [torch.from_numpy(value).float() for value in item.program.run(inputs)]
            if signal_to_noise(wanted, given) >= enough(name):
                # the int8 network all in floats is not the network as it was, and calls are told apart by their label
                label = f"{item.runtime}, {form}" + (f" as {item.form}" if item.form not in ("", form) else "")
                label += f" with float {item.kept_float}" if item.form == "mixed" else ""
                made.append(Delivery(label, program=item.program, layers=item.layers))
    return timed(made, inputs, SECONDS / 4, beside={"eager": lambda: forward(model, inputs)})


def cell(name: str, size: int) -> dict[str, Any]:
    """Measure one network at one batch size."""
    model, data, some = network(name)
    inputs = some[:size].contiguous()
    found = ours(name, model, data, inputs)
    chosen = found[0]
    if chosen.program is None:
        raise RuntimeError(f"{name} runs nowhere")
    wanted = expected_outputs(model, inputs)
    quality = signal_to_noise(wanted, [torch.from_numpy(value).float() for value in chosen.program.run(inputs)])
    calls: dict[str, Callable[[], object]] = {"ours": chosen.program.prepared(inputs)}
    calls["eager"] = lambda: forward(model, inputs)
    missing: dict[str, str] = {}
    folder = cache() / NAME / name
    for peer, prepare in PEERS.items():
        try:
            calls[peer] = prepare(model, data, inputs, folder)
        except (FeatherweightError, NotImplementedError, RuntimeError, ValueError) as error:
            missing[peer] = str(error).strip().splitlines()[0][:200]
    with one_thread(), torch.inference_mode():
        times = rounds(calls, SECONDS)
    peers = [peer for peer in PEERS if peer in times]
    best = min(peers, key=lambda peer: statistics.median(times[peer]))
    tried = {item.runtime: item.latency.median * 1e3 for item in found if item.latency is not None}
    return {
        "chosen": chosen.runtime,
        "sqnr_db": round(quality, 1),
        "relative_error": 10 ** (-quality / 20),
        "milliseconds": {key: _milliseconds(values) for key, values in times.items()},
        "best_peer": best,
        "over_eager": list(paired_ratio(times["eager"], times["ours"])),
        "over_best": list(paired_ratio(times[best], times["ours"])),
        "tried": {key: round(value, 3) for key, value in tried.items()},
        "not_int8": [row["path"] for row in chosen.missed()],
        "missing": missing,
    }


def _milliseconds(values: list[float]) -> list[float]:
    item = summary(values)
    return [round(1e3 * value, 3) for value in (item.median, item.low, item.high)]


def rows(name: str, cells: dict[str, Any]) -> None:
    """Write the rows of one network whose sizes are all measured."""
    told = "; ".join(f"batch {size}: {_told(item)}" for size, item in cells.items())
    eager, first = cells["1"]["over_eager"], cells["1"]
    if name != "efficientnet":
        note = f"{eager[1]:.2f} to {eager[2]:.2f} (95 %); {told}"
        record(NAME, f"quantization.{name}.over_eager", round(eager[0], 2), 1, note, cells)
    worst = min(cells.values(), key=lambda item: float(item["over_best"][0]))
    low, high = worst["over_best"][1:]
    note = f"the smaller of batch 1 and 32, {low:.3f} to {high:.3f} (95 %, paired rounds); {told}"
    record(NAME, f"quantization.{name}.over_best_runtime", round(worst["over_best"][0], 3), 1, note, cells)
    if name == "encoder":
        note = f"of the logits, root mean square over the root mean square of PyTorch's; {first['chosen']}"
        record(NAME, "quantization.encoder.logit_error", round(first["relative_error"], 4), 1, note)


def _told(item: dict[str, Any]) -> str:
    times = ", ".join(
        f"{key} {low[0]:.2f}" for key, low in sorted(item["milliseconds"].items(), key=lambda it: it[1][0])
    )
    gone = "".join(f", {peer}: {why}" for peer, why in item["missing"].items())
    return f"ours is {item['chosen']} at {item['sqnr_db']} dB; ms {times}{gone}"


def main() -> None:
    """Measure what is missing, and write the rows of networks that are complete."""
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.networks:
        for size in SIZES:
            done = kept(NAME)
            if given.again or str(size) not in done.get(name, {}):
                done.setdefault(name, {})[str(size)] = cell(name, size)
                keep(NAME, done)
                sys.stderr.write(f"{name}, batch {size}: {_told(done[name][str(size)])}\n")
        rows(name, kept(NAME)[name])


if __name__ == "__main__":
    main()
