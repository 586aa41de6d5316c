"""Post-training quantization for few bytes: nearest codes, ours, ours compensated, and nncodec 2.1.3 end to end.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_rdoq.py [--networks resnet56 vgg19 minilm] [--images 5000]

Needs the extras `bench` and `speed`. ResNet-56 and VGG-19 on CIFAR-10 (JPEG copy), MiniLM on SST-2; nothing is trained, no
label is read before scores are. The coarsest setting of a way that keeps an accuracy is found by halving, and then among all
that were measured, until the four to either side of it are among them. Since accuracies are noisy, that of a setting is read off
the rising curve that comes nearest to all of its way (isotonic regression: Barlow et al., 1972). On MiniLM, where a sentence more or
less of 692 is more than the points in question, it is the original's less what is lost in proportion to the divergence of its
outputs from the original's, in nats, by the line through all settings of all ways up to 0.2: rounding flips answers either way, and
what it loses on balance is, to second order, the variance that it adds, which the divergence measures. Two settings to either
side do there; run it twice, since settings that come later move the line. Bytes are those of the streams of all quantized tensors,
scales included. Nearest codes have a step in proportion to each tensor's root mean square, and our coder. After ours the statistics
of batch norms are moved by what the same calibration batches say; ours compensates no errors, compensated does.
nncodec has its own quantizer, dependent quantization on as by default, the same `qp` for all tensors as by default, and its own
coder; its headers do not count. What counts of each way is its smallest bytes within half a point of the original on validation
data; ours against another way, the smallest at most 0.1 points below that one, or below the original where that one is above
it. Test accuracies of what was chosen are beside. A cell that is done is kept.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import cifar
import numpy as np
import sentiment
import torch
from bytes_coder import Peer
from originals import device
from results import keep, kept, record
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from featherweight import Context, Recipe, Task
from featherweight.allocation.truth import Reference
from featherweight.artifact import package
from featherweight.coding import encode_tensor
from featherweight.costs import original_bytes
from featherweight.edits import module_at
from featherweight.layers import QuantizedLayer
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.techniques import QuantizeRateDistortion, ReestimateNorms

NAME = "bytes_rdoq"
TASKS: dict[str, Callable[[], Task]] = {
    "resnet56": lambda: cifar.task("resnet56"),
    "vgg19": lambda: cifar.task("vgg19"),
    "minilm": sentiment.task,
}
BATCHES = {"resnet56": 8, "vgg19": 4, "minilm": 16}
STEPS = (0.14, 0.17, 0.2, 0.24, 0.28, 0.33, 0.4, 0.45, 0.5, 0.55, 0.6, 0.66, 0.72, 0.78, 0.85, 0.92, 1.0, 1.1, 1.2, 1.3)
STEPS += (1.4, 1.55, 1.7, 1.85, 2.0, 2.2, 2.4, 2.6, 2.8, 3.1, 3.4)
QUANTIZERS = tuple(range(-36, -11, 1))
AROUND = 4  # settings that are tried to either side of the one found so far
BY_NATS = ("minilm",)  # networks whose accuracies are read off divergences; two settings to either side are enough
VALIDATION, FAR = 692, 0.2  # sentences of MiniLM's, and nats up to which accuracy is lost in proportion
LOSS, APART = 0.5, 0.1  # points of validation accuracy
Cell = dict[str, Any]


class Bench:
    """One network: its task, its cells, and what trials on the same weights share."""

    def __init__(self, name: str, images: int | None) -> None:
        self.name, self.trial, task = name, images is not None, TASKS[name]()
        self.model, data = task.model.eval(), task.data
        if images is not None:
            parts = {part: _first(getattr(data, part), images) for part in ("validate", "test")}
            data = dataclasses.replace(data, **parts)
        unlabelled = [(inputs, None) for inputs, _ in itertools.islice(data.calibrate or (), BATCHES[name])]
        self.data, self.peer = dataclasses.replace(data, calibrate=unlabelled), Peer()
        self.context = Context(data=self.data, teacher=self.model)
        known = {} if self.trial else kept(NAME)
        self.cells: dict[str, Cell] = {
            key: value
            for key, value in known.items()
            if key.startswith(f"{name} ") and (name not in BY_NATS or "nats" in value)
        }
        self.paths: list[str] = []
        self.original = self.cell("original", lambda: (self.model, original_bytes(self.model)))

    def cell(self, way: str, make: Callable[[], tuple[nn.Module, int]]) -> Cell:
        """Return what is known of one setting, measured if it is not."""
        key = f"{self.name} {way}"
        if key not in self.cells:
            model, size = make()
            cell = {"bytes": size, "validate": self._score(model, "validate")}
            if self.name in BY_NATS:
                cell["nats"] = self._reference.divergence(model)
            self._remember(key, cell)
        return self.cells[key]

    @cached_property
    def _reference(self) -> Reference:
        """The original's outputs on validation data."""
        data = dataclasses.replace(self.data, calibrate=self.data.validate)
        return Reference(self.model, Context(data=data), VALIDATION)

    def tested(self, way: str, make: Callable[[], tuple[nn.Module, int]]) -> Cell:
        """Return the cell with its test accuracy."""
        cell = self.cell(way, make)
        if "test" not in cell:
            self._remember(f"{self.name} {way}", {**cell, "test": self._score(make()[0], "test")})
        return self.cells[f"{self.name} {way}"]

    def _score(self, model: nn.Module, part: str) -> float:
        """Return the accuracy on one part of the data in per cent."""
        return 100 * evaluate(copy.deepcopy(model).to(device()), self.data, part, device()).value

    def _remember(self, key: str, cell: Cell) -> None:
        self.cells[key] = cell
        if not self.trial:
            keep(NAME, {**kept(NAME), key: cell})
        sys.stdout.write(f"{key}: {cell}\n")
        sys.stdout.flush()

    def coarsest(self, way: str, floor: float) -> str | None:
        """Return the cell of the coarsest setting found of a way that keeps a validation accuracy, or None."""
        made = dict(self._settings(way))
        labels = list(made)

        def fits(label: str) -> bool:
            value = self.cell(label, made[label])["validate"]
            return bool((self._by_nats(label) if self.name in BY_NATS else value) >= floor)

        low, high = -1, len(labels)  # accuracy falls with the step, near enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(labels[middle]) else (low, middle)
        label: str | None = labels[max(0, low)]
        missing, around = True, AROUND // 2 if self.name in BY_NATS else AROUND
        while label is not None and missing:
            place = labels.index(label)
            near = labels[max(0, place - around) : place + around + 1]
            known = len(self.cells)
            for one in near:
                self.cell(one, made[one])
            missing = known < len(self.cells)
            label = next((one for one, value in self.curve(way) if value >= floor), None)
        return label

    def curve(self, way: str) -> list[tuple[str, float]]:
        """Return the measured settings of a way and their validation accuracies made to rise with bytes, fewest bytes first."""
        labels = [label for label, _ in self._settings(way) if f"{self.name} {label}" in self.cells]
        labels.sort(key=lambda label: self.cells[f"{self.name} {label}"]["bytes"])
        if self.name in BY_NATS:
            return [(label, self._by_nats(label)) for label in labels]
        values = [self.cells[f"{self.name} {label}"]["validate"] for label in labels]
        return list(zip(labels, isotonic_regression(values).x.tolist(), strict=True))

    def _by_nats(self, label: str) -> float:
        """The accuracy that the divergence of a setting stands for; its own, where that is too far from the original."""
        whole, own = self.original["validate"], self.cells[f"{self.name} {label}"]
        if own["nats"] > FAR:
            return float(own["validate"])
        known = [cell for cell in self.cells.values() if cell["nats"] <= FAR]
        lost = sum((whole - cell["validate"]) * cell["nats"] for cell in known)
        return float(whole - max(0.0, lost) / sum(cell["nats"] ** 2 for cell in known) * own["nats"])

    def _settings(self, way: str) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, int]]]]:
        if way == "nncodec":
            for quantizer in QUANTIZERS:
                yield f"nncodec qp {quantizer}", lambda quantizer=quantizer: self._by_peer(quantizer)
            return
        for step in STEPS:
            recipe = self.recipe(way, step)
            yield f"{way} {step:g}", lambda recipe=recipe: self._by_us(recipe)

    def recipe(self, way: str, step: float) -> Recipe:
        """Return the recipe of one of our ways."""
        if way == "nearest":
            return Recipe((QuantizeRateDistortion(step, 0.0, "none"),))
        batches = BATCHES[self.name]
        rounded = QuantizeRateDistortion(step, compensate=way == "compensated", batches=batches)
        return Recipe((rounded, ReestimateNorms(batches=batches)))

    def _by_us(self, recipe: Recipe) -> tuple[nn.Module, int]:
        model, _ = run(recipe, self.model, self.context)
        layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
        parts = [part for layer in layers for part in (layer.codes, layer.scale) if isinstance(part, Tensor)]
        return model, sum(len(encode_tensor(part)) for part in parts)

    def _by_peer(self, quantizer: int) -> tuple[nn.Module, int]:
        if not self.paths:
            ours, _ = run(self.recipe("nearest", 1.0), self.model, self.context)
            self.paths = [path for path, layer in ours.named_modules() if isinstance(layer, QuantizedLayer)]
        model, size = copy.deepcopy(self.model), 0
        for path in self.paths:
            weight = module_at(model, path).get_parameter("weight")
            back, length = coded(self.peer, weight.detach(), quantizer)
            weight.data.copy_(back)
            size += length
        return model, size

    def chosen(self, way: str, floor: float) -> tuple[str, Cell] | None:
        """Return the smallest of a way whose validation accuracy is at least `floor`, tested, or None where none is."""
        label = self.coarsest(way, floor)
        if label is None:
            return None
        cell = self.tested(label, dict(self._settings(way))[label])
        return label, {**cell, "curve": round(dict(self.curve(way))[label], 2)}

    def whole(self, label: str) -> int:
        """Return the bytes of a whole file, graph and all, at one of our settings."""
        way, step = label.rsplit(" ", 1)

        def make() -> tuple[nn.Module, int]:
            model, edits = run(self.recipe(way, float(step)), self.model, self.context)
            return model, len(package(model, edits, {}, export_graph(model, self.data)).to_bytes())

        return int(self.tested(f"file {label}", make)["bytes"])


def coded(peer: Peer, weight: Tensor, quantizer: int) -> tuple[Tensor, int]:
    """Return what nncodec makes of a weight, and the bytes of its stream; called as its own `nnc_core` calls it."""
    values = np.ascontiguousarray(weight.numpy(), np.float32)
    codes, back = np.zeros(values.shape, np.int32), np.zeros(values.shape, np.float32)
    encoder, decoder = peer.coder.Encoder(), peer.coder.Decoder()
    encoder.initCtxModels(10, 0)
    used = encoder.quantLayer(values, codes, 1, 2, quantizer, 0, 10, 0, 0)
    stream = peer.coder.Encoder()
    stream.initCtxModels(11, 1)
    stream.encodeLayer(codes.copy(), 1, 0, 0, 0, 0, np.zeros(len(codes), np.int32), *peer.off, 0, 0)
    decoder.dequantLayer(back, codes, 2, used, 0)
    return torch.from_numpy(back), len(stream.finish())


def _first(loader: Any, count: int) -> list[Any]:
    """Return the first batches, as many as have `count` samples."""
    found, seen = [], 0
    for batch in loader:
        found.append(batch)
        seen += len(batch[1])
        if seen >= count:
            break
    return found


def compared(bench: Bench) -> dict[str, Any]:
    """Return the ratios of a network: ours to nearest, compensated to ours, ours to nncodec, and what they come from."""
    floor = bench.original["validate"] - LOSS
    picks: dict[str, Any] = {}

    def against(other: str, way: str) -> float | None:
        known = chosen.get(other)
        if known is None:
            return None
        # what rounding happens to gain on a few hundred sentences is no accuracy to be kept
        picked = bench.chosen(way, min(known[1]["curve"], bench.original["validate"]) - APART)
        picks[f"{way} against {other}"] = (picked, known)
        chosen.setdefault(way, picked)
        return None if picked is None else float(picked[1]["bytes"] / known[1]["bytes"])

    chosen = {way: bench.chosen(way, floor) for way in ("nearest", "nncodec")}
    ratios = {"ours": against("nearest", "ours"), "compensated": against("ours", "compensated")}
    over = [ratio for way in ("ours", "compensated") if (ratio := against("nncodec", way)) is not None]
    return {**ratios, "over_nncodec": min(over, default=None), "picks": picks}


def main() -> None:
    """Measure what is missing and write the rows; none is written for the first images alone."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--networks", nargs="*", choices=tuple(TASKS), default=list(TASKS))
    asked.add_argument("--images", type=int, default=None, help="only try: read so many images, and write no row")
    options = asked.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in options.networks:
        bench = Bench(name, options.images)
        found[name] = compared(bench)
        sys.stdout.write(f"{name}: {found[name]}\n")
        if options.images is None:
            rows(bench, found[name])
    if options.images is None and set(found) == set(TASKS):
        for figure, key in (("rdoq", "ours"), ("cerwu", "compensated")):
            savings = {name: round(100 * (1 - (row[key] or 1.0)), 1) for name, row in found.items()}
            note = (
                f"fewer bytes in per cent, the least of {savings}; at most {APART} points of validation accuracy below, a surplus "
                "over the original's apart; the statistics of batch norms are moved after ours and compensated, not after nearest codes; "
                f"accuracies of {', '.join(BY_NATS)} are read off divergences, a later choice: by curves through accuracies, "
                "which 692 sentences cannot tell apart, the saving there was 9.9, or none"
            )
            record(NAME, f"bytes.{figure}.saving", min(savings.values()), 1, note, found)


def rows(bench: Bench, found: dict[str, Any]) -> None:
    """Write the rows of one network."""
    note = f"quantized tensors; original {bench.original}; " + "; ".join(f"{k}: {v}" for k, v in found["picks"].items())
    over = found["over_nncodec"]
    record(NAME, f"bytes.{bench.name}.over_nncodec", None if over is None else round(over, 4), 1, note, found)
    safe = bench.original["validate"] - LOSS / 2  # half is left to what validation data cannot tell
    picked = bench.chosen("compensated", safe) if bench.name == "vgg19" else None
    if picked is not None:
        label = picked[0]
        size = bench.whole(label)
        cell, before = bench.cells[f"vgg19 file {label}"], bench.tested("original", lambda: (bench.model, 0))
        holds = before["test"] - cell["test"] <= LOSS
        note = (
            f"whole file of {size} bytes, {label}, nothing trained, no labels read: test accuracy "
            f"{cell['test']:.2f} %, of the original {before['test']:.2f} %; chosen on validation data"
        )
        ratio = round(bench.original["bytes"] / size, 2) if holds else None
        record(NAME, "bytes.vgg19.ptq.ratio", ratio, 1, note, cell)


if __name__ == "__main__":
    main()
