"""VGG-19 on CIFAR-10 (JPEG copy) in few bytes: its own layers, and a student cut out of it.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_vgg19.py [own] [student]

Channels are cut by their first-order importance over the whole network; what remains is healed with the original as teacher, and
then trained for its bits. `own` may lose half a point, the student must keep 96 % of the accuracy. What the teacher answers is
computed once for a few passes over the training data, which are then read again and again. Of the rates that a bit costs, the
smallest file whose validation accuracy is enough counts; its test accuracy is read once and decides whether it holds. Enough is
said by the original's test accuracy: it was trained on the images that validate here, and scores six points more on them. A cell
that is done is kept, and a killed training goes on.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from cifar import task
from originals import cache, device, trainer
from results import keep, kept, record
from taught import taught
from torch import nn

from featherweight import Context, Data, Recipe, run
from featherweight.artifact import package
from featherweight.costs import original_bytes
from featherweight.measurement import structure
from featherweight.portable import export_graph
from featherweight.scoring import evaluate
from featherweight.techniques import Distill, FoldBatchNorm, PenalizeEntropy, PruneChannels

NAME = "bytes_vgg19"
PASSES = 4  # over the training data, one epoch of the lesson


@dataclass(frozen=True)
class Kind:
    """One of the two rows.

    Attributes:
        cut: which channels go.
        heal: the training of what remains.
        rates: what a bit costs, from mild to strong.
        penalized: epochs of the training for bytes.
        share: of the original's accuracy that must stay, 0 to 1.
        lost: points that may be lost.
    """

    cut: PruneChannels
    heal: Distill
    rates: tuple[float, ...]
    penalized: int
    share: float = 0.0
    lost: float = 100.0

    def floor(self, accuracy: float) -> float:
        """Return the least accuracy, in per cent, that is enough."""
        return max(self.share * accuracy, accuracy - self.lost)


KINDS = {
    "student": Kind(
        PruneChannels(ratio=0.8, importance="taylor", ranking="global", minimum=16),
        Distill(epochs=4, learning_rate=3e-3, teacher_share=0.0),
        (1.0,),
        3,
        share=0.96,
    ),
    "own": Kind(
        PruneChannels(ratio=0.6, importance="taylor", ranking="global", minimum=48),
        Distill(epochs=1, learning_rate=1e-3, teacher_share=0.0),
        (0.3,),
        2,
        lost=0.5,
    ),
}


def cells(name: str, model: nn.Module, lessons: Data, done: dict[str, Any]) -> None:
    """Measure what is missing of one row: the healed network, and its file at every rate."""
    kind = KINDS[name]

    def context(part: str) -> Context:
        return Context(lessons, None, device(), report=_say, workspace=cache() / NAME / f"{name} {part}")

    start = model.to(memory_format=torch.channels_last)
    healed, edits = run(Recipe((kind.cut, kind.heal)), start, context("healed"))
    healed, folds = run(FoldBatchNorm(), healed, context("healed"))
    if f"{name} healed" not in done:
        done[f"{name} healed"] = {
            "macs": structure(healed, lessons).macs,
            "parameters": sum(value.numel() for value in healed.parameters()),
            "widths": [layer.out_channels for layer in healed.modules() if isinstance(layer, nn.Conv2d)],
            "validate": 100 * evaluate(healed, lessons, "validate", device()).value,
        }
        keep(NAME, done)
    _say(f"{name} healed: {done[f'{name} healed']}")
    for rate in kind.rates:
        key = f"{name} {rate:g}"
        if key not in done:
            penalized = PenalizeEntropy(kind.penalized, learning_rate=1e-3, rate=rate, bits=4, teacher_share=0.0)
            small, more = run(penalized, healed, context(f"{rate:g}"))
            small.cpu()
            done[key] = {
                "bytes": len(package(small, [*edits, *folds, *more], {}, export_graph(small, lessons)).to_bytes()),
                "recipe": f"{kind.cut} -> {kind.heal} -> fold_batch_norm() -> {penalized}",
                "trained_on": trainer(),
                **{part: 100 * evaluate(small, lessons, part).value for part in ("validate", "test")},
            }
            keep(NAME, done)
        _say(f"{key}: {done[key]}")


def row(name: str, model: nn.Module, done: dict[str, Any]) -> None:
    """Write the row: the smallest file that is accurate enough on validation data, if it is on test data too."""
    kind, whole, before = KINDS[name], original_bytes(model), done["original"]
    made = {rate: done[f"{name} {rate:g}"] for rate in kind.rates}
    fitting = [cell for cell in made.values() if cell["validate"] >= kind.floor(before["test"])]
    chosen = (
        min(fitting, key=lambda cell: cell["bytes"]) if fitting else max(made.values(), key=lambda c: c["validate"])
    )
    holds = bool(fitting) and chosen["test"] >= kind.floor(before["test"])
    healed = done[f"{name} healed"]
    note = (
        f"whole file of {chosen['bytes']:,} bytes, graph and all, of {whole:,}: {whole / chosen['bytes']:.1f}x; test accuracy "
        f"{chosen['test']:.2f} %, of the original {before['test']:.2f} %, at least {kind.floor(before['test']):.2f} % is asked; "
        f"on validation data {chosen['validate']:.2f} %; {healed['parameters']:,} parameters, "
        f"{healed['macs']:,} multiply-adds, channels {healed['widths']}; {chosen['recipe']}, trained on {chosen['trained_on']}; an "
        f"epoch is {PASSES} passes over the training data"
    )
    record(NAME, f"bytes.vgg19.{name}.ratio", round(whole / chosen["bytes"], 1) if holds else None, 1, note, done)


def main() -> None:
    """Train what is missing, and write the rows asked for."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("rows", nargs="*", default=list(KINDS))
    made, done = task("vgg19"), kept(NAME)
    torch.set_num_threads(1)
    if "original" not in done:
        whole = copy.deepcopy(made.model).to(device())
        done["original"] = {
            part: 100 * evaluate(whole, made.data, part, device()).value for part in ("validate", "test")
        }
        keep(NAME, done)
    for name in asked.parse_args().rows:
        if not all(f"{name} {rate:g}" in done for rate in KINDS[name].rates):
            with torch.autocast(device().type, torch.bfloat16):  # the teacher's answers
                lessons = taught(made.data, made.model, PASSES, 0)
            cells(name, made.model, lessons, done)
        row(name, made.model, done)


def _say(message: str, _: float = 0.0) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
