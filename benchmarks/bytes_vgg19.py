"""VGG-19 on CIFAR-10 (JPEG copy) in few bytes: its own layers, and a student cut out of it.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_vgg19.py [own] [student] [--seeds 0 1 2]

Channels are cut by their first-order importance over the whole network; what remains is healed with the original as teacher, and
then trained for its bits. `own` may lose half a point, the student must keep 96 % of the accuracy. What the teacher answers is
computed once for a few passes over the training data, which are then read again and again. Of the rates that a bit costs, the
smallest file of a seed whose validation accuracy is enough counts; the mean of the seeds' test accuracies, read once, decides
whether the mean of their ratios holds. Enough is said by the original's test accuracy: it was trained on the images that validate
here, and scores six points more on them. A cell that is done is kept, and a killed training goes on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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
        Distill(epochs=3, learning_rate=2e-3, teacher_share=0.0),
        (0.3, 0.6),
        4,
        lost=0.5,
    ),
}


def cells(name: str, seed: int, model: nn.Module, lessons: Data, done: dict[str, Any]) -> None:
    """Measure what is missing of one seed of a row: the healed network, and its file at every rate."""
    kind = KINDS[name]

    def context(part: str) -> Context:
        return Context(lessons, None, device(), seed, report=_say, workspace=cache() / NAME / f"{name} {seed} {part}")

    start = model.to(memory_format=torch.channels_last)
    healed, edits = run(Recipe((kind.cut, kind.heal)), start, context("healed"))
    healed, folds = run(FoldBatchNorm(), healed, context("healed"))
    if f"{name} {seed} healed" not in done:
        done[f"{name} {seed} healed"] = {
            "macs": structure(healed, lessons).macs,
            "parameters": sum(value.numel() for value in healed.parameters()),
            "widths": [layer.out_channels for layer in healed.modules() if isinstance(layer, nn.Conv2d)],
            "validate": 100 * evaluate(healed, lessons, "validate", device()).value,
        }
        keep(NAME, done)
    _say(f"{name} {seed} healed: {done[f'{name} {seed} healed']}")
    for rate in kind.rates:
        key = f"{name} {seed} {rate:g}"
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


def row(name: str, seeds: list[int], model: nn.Module, done: dict[str, Any]) -> None:
    """Write the row: the mean over seeds of the ratio of the smallest file that is accurate enough on validation data."""
    kind, whole, before = KINDS[name], original_bytes(model), done["original"]
    floor, chosen = kind.floor(before["test"]), []
    for seed in seeds:
        made = [done[f"{name} {seed} {rate:g}"] for rate in kind.rates]
        fitting = [cell for cell in made if cell["validate"] >= floor]
        chosen.append(min(fitting, key=lambda cell: cell["bytes"]) if fitting else None)
    found = [cell for cell in chosen if cell is not None]
    holds = len(found) == len(seeds) and statistics.mean(cell["test"] for cell in found) >= floor
    healed, best = done[f"{name} {seeds[0]} healed"], found or [done[f"{name} {seeds[0]} {kind.rates[0]:g}"]]
    told = "; ".join(
        f"{cell['bytes']:,} bytes, {whole / cell['bytes']:.1f}x, {cell['test']:.2f} % ({cell['validate']:.2f} % on validation data)"
        for cell in best
    )
    note = (
        f"whole files, graph and all, of {whole:,} bytes, and test accuracies, of the original {before['test']:.2f} %, at least "
        f"{floor:.2f} % is asked: {told}; {healed['parameters']:,} parameters, {healed['macs']:,} multiply-adds, channels "
        f"{healed['widths']}; {best[0]['recipe']}, trained on {best[0]['trained_on']}; an epoch is {PASSES} passes over the training data"
    )
    got = round(statistics.mean(whole / cell["bytes"] for cell in found), 1) if holds else None
    record(NAME, f"bytes.vgg19.{name}.ratio", got, len(seeds), note, done)


def main() -> None:
    """Train what is missing, and write the rows asked for."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("rows", nargs="*", default=list(KINDS))
    asked.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options, made, done = asked.parse_args(), task("vgg19"), kept(NAME)
    torch.set_num_threads(1)
    if "original" not in done:
        whole = copy.deepcopy(made.model).to(device())
        done["original"] = {
            part: 100 * evaluate(whole, made.data, part, device()).value for part in ("validate", "test")
        }
        keep(NAME, done)
    for name in options.rows:
        for seed in options.seeds:
            if not all(f"{name} {seed} {rate:g}" in done for rate in KINDS[name].rates):
                with torch.autocast(device().type, torch.bfloat16):  # the teacher's answers
                    lessons = taught(made.data, made.model, PASSES, seed)
                cells(name, seed, made.model, lessons, done)
        row(name, options.seeds, made.model, done)


def _say(message: str, _: float = 0.0) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
