"""Post-training quantization beside NNCF, ONNX Runtime and torchao: the same networks, the same calibration samples.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/quantization_ptq.py [resnet20 vgg19 lstm minilm mlp efficientnet]

Needs the extras `bench`, `openvino` and `ao`. Batch norms are folded before anyone quantizes; nothing is trained and no label is
read. `int8` is weights and activations, static.
Ours runs in ONNX Runtime from its exported graph. Peers, as their documentation has them: `nncf.quantize` on the OpenVINO model
(for MiniLM both with and without `model_type=TRANSFORMER`), run by OpenVINO; `quantize_static` of ONNX Runtime with QUInt8
activations and QInt8 weights per channel (of the LSTM `quantize_dynamic`, which has a kernel for it); torchao's PT2E with
`X86InductorQuantizer`, which has nothing for an LSTM. `w4` is weights alone, ours; `ternary` the bits of codes of -1, 0 and 1, the
nearest ones. A cell that is done is kept.

Where accuracies tie (the 95 % interval of the paired difference holds zero), the SQNR of the logits decides.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import cifar
import efficientnet
import letters
import sentiment
import speech
import torch
from codes import stored
from ptq_peers import PEERS, nncf
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Task, post_training
from featherweight.data import batches, forward
from featherweight.portable import assemble, export_graph
from featherweight.running import run
from featherweight.runtimes.onnxruntime import Session
from featherweight.technique import Technique
from featherweight.techniques import FoldBatchNorm, QuantizeWeights

NAME = "quantization_ptq"
NETWORKS: dict[str, Callable[[], Task]] = {
    "resnet20": lambda: cifar.task("resnet20"),
    "vgg19": lambda: cifar.task("vgg19"),
    "lstm": speech.task,
    "minilm": sentiment.task,
    "mlp": letters.task,
    "efficientnet": efficientnet.task,
}
SAMPLES = {"resnet20": 1024, "vgg19": 512, "lstm": 600, "minilm": 256, "mlp": 1000, "efficientnet": 100}
OURS: dict[str, Technique] = {
    "int8": post_training(8, batches=1000),
    "w4": post_training(4, integers=False, batches=1000),
}
Cell = dict[str, Any]


class Bench:
    """One network, folded, with as many calibration samples as it gets, and the cells that are measured."""

    def __init__(self, name: str) -> None:
        task, self.name = NETWORKS[name](), name
        read, some = 0, list[Any]()
        for inputs, _ in task.data.calibrate or ():
            if read < SAMPLES[name]:
                parts = inputs if isinstance(inputs, tuple) else (inputs,)
                parts = tuple(part[: SAMPLES[name] - read] for part in parts)
                some.append((parts if isinstance(inputs, tuple) else parts[0], None))
                read += len(parts[0])
        self.data = dataclasses.replace(task.data, calibrate=some)
        self.model = run(FoldBatchNorm(), task.model.eval(), Context(data=self.data)).model
        self.labels = torch.cat([target for _, target in batches(self.data.test, "test")])
        self.cells: dict[str, Cell] = kept(NAME).get(name, {})
        self.wanted = self._in_pytorch(self.model)

    def measure(self) -> dict[str, Cell]:
        """Measure what is missing, and return all cells."""
        self._cell("original", lambda: (self.wanted, {}))
        for way, technique in OURS.items():
            made = functools.cache(lambda technique=technique: self._made(technique))
            self._cell(f"ours {way}", lambda made=made: (self._in_onnxruntime(made()[0]), made()[1]))
            if way == "int8":
                self._cell("ours int8 reference", lambda made=made: (self._in_pytorch(made()[0]), {}))
        if "ternary" not in self.cells:
            self._keep("ternary", stored(run(QuantizeWeights(bits=2), self.model, Context(data=self.data)).model))
        for peer, logits in PEERS.items():
            self._cell(peer, lambda logits=logits: (logits(self.model, self.data, SAMPLES[self.name]), {}))
        if self.name == "minilm":
            self._cell("nncf transformer", lambda: (nncf(self.model, self.data, SAMPLES[self.name], True), {}))
        return self.cells

    def _cell(self, key: str, make: Callable[[], tuple[Tensor, Cell]]) -> None:
        if key in self.cells:
            return
        started = time.process_time()
        try:
            given, more = make()
        except NotImplementedError as error:
            cell: Cell = {"unsupported": str(error)}
        else:
            hits = given.argmax(1) == self.labels
            gap = (given - self.wanted).double().square().sum()
            quality = 10 * math.log10(float(self.wanted.double().square().sum() / gap)) if gap else None
            cell = {"accuracy": 100 * float(hits.double().mean()), "sqnr_db": quality, "cpu_seconds": 0.0, **more}
            cell["cpu_seconds"] = round(time.process_time() - started, 1)
            cell["hits"] = "".join("01"[hit] for hit in hits.tolist())
        self._keep(key, cell)

    def _keep(self, key: str, cell: Cell) -> None:
        self.cells[key] = cell
        keep(NAME, {**kept(NAME), self.name: self.cells})
        sys.stderr.write(f"{self.name} {key}: { {name: value for name, value in cell.items() if name != 'hits'} }\n")

    def _made(self, technique: Technique) -> tuple[nn.Module, Cell]:
        context = Context(data=self.data)
        model, _ = run(technique, self.model, context)
        fallen = [left.path for left in context.untouched if "fell back" in left.reason]
        return model, {"recipe": str(technique), "fell_back": fallen, **stored(model)}

    def _in_onnxruntime(self, model: nn.Module) -> Tensor:
        session = Session(assemble(export_graph(model, self.data), model.state_dict()))
        found = [torch.from_numpy(session.run(inputs)[0]) for inputs, _ in batches(self.data.test, "test")]
        return torch.cat(found)

    def _in_pytorch(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([forward(model, inputs) for inputs, _ in batches(self.data.test, "test")])


def paired(first: Cell, second: Cell) -> tuple[float, float]:
    """Return by how many points the first is more accurate, and half its 95 % interval, over the same samples."""
    difference = [int(a) - int(b) for a, b in zip(first["hits"], second["hits"], strict=True)]
    mean = sum(difference) / len(difference)
    variance = sum((value - mean) ** 2 for value in difference) / (len(difference) - 1)
    return 100 * mean, 196 * math.sqrt(variance / len(difference))


def rows(name: str, cells: dict[str, Cell]) -> None:
    """Write the rows of one network."""
    original = cells["original"]
    details = {key: {field: value for field, value in cell.items() if field != "hits"} for key, cell in cells.items()}
    count = len(original["hits"])
    for way in OURS:
        ours = cells[f"ours {way}"]
        lost, margin = paired(original, ours)
        note = (
            f"test accuracy {original['accuracy']:.2f} to {ours['accuracy']:.2f}, {lost:+.2f} +- {margin:.2f} points lost (paired, 95 %), "
            f"SQNR of the logits {ours['sqnr_db']:.1f} dB, n = {count}; {ours['recipe']}; {SAMPLES[name]} samples calibrate; codes take "
            f"{ours['bits']:.3f} bits a weight in the file, scales and biases {ours['bytes_beside']:,} bytes beside; "
            f"layers that fell back to float inputs: {len(ours.get('fell_back', ()))}; ONNX Runtime"
        )
        record(NAME, f"quantization.{name}.{way}.drop", round(lost, 3), 1, note)
    record(NAME, f"quantization.{name}.over_peers", *over_peers(cells), details)


def over_peers(cells: dict[str, Cell]) -> tuple[float, int, str]:
    """Return by how much ours is better than the best peer, the number of seeds, and what was seen.

    Accuracy decides; where the 95 % interval of the paired difference holds zero, the SQNR of the logits does, over the peer that
    comes nearest to ours. torchao's model and ours beside it are run by PyTorch's reference operators, the others' and ours beside
    them by runtimes.
    """
    peers = {key: cell for key, cell in cells.items() if key.split()[0] in PEERS}
    able = {peer: cell for peer, cell in peers.items() if "hits" in cell}
    ours = {peer: cells["ours int8 reference" if peer == "torchao" else "ours int8"] for peer in able}
    best = max(able, key=lambda peer: (able[peer]["accuracy"], able[peer]["sqnr_db"]))
    points, margin = paired(ours[best], able[best])
    quieter = {peer: ours[peer]["sqnr_db"] - cell["sqnr_db"] for peer, cell in able.items()}
    nearest = min(quieter, key=lambda peer: quieter[peer])
    shown = {key: cells[key] for key in ("ours int8", "ours int8 reference")} | peers
    table = "; ".join(
        f"{key} {cell['accuracy']:.2f} %, {cell['sqnr_db']:.1f} dB"
        if "hits" in cell
        else f"{key}: {cell['unsupported']}"
        for key, cell in shown.items()
    )
    seen = f"n = {len(cells['original']['hits'])}; {table}"
    against = f"{best}, the most accurate peer: {points:+.2f} +- {margin:.2f} points (paired, 95 %)"
    if abs(points) > margin:
        return round(points, 3), 1, f"points over {against}; {seen}"
    return round(quieter[nearest], 3), 1, f"dB over {nearest}, because accuracies tie with {against}; {seen}"


def main() -> None:
    """Measure the networks asked for, and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=" ".join(NETWORKS))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for name in parser.parse_args().networks:
        rows(name, Bench(name).measure())
    for figure, way in (("w4", "ours w4"), ("ternary", "ternary")):
        done = {name: cells[way]["bits"] for name, cells in kept(NAME).items() if way in cells}
        each = ", ".join(f"{name} {bits:.3f}" for name, bits in done.items())
        note = f"the largest of {each}; the codes of all quantized layers as they are in the file, scales apart"
        record(NAME, f"quantization.bits.{figure}", round(max(done.values()), 3), 1, note)


if __name__ == "__main__":
    main()
