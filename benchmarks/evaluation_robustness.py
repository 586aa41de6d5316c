"""Accuracy of compressed files where the data are worse than in training: noise, image corruptions, word edits, per recipe.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/evaluation_robustness.py [mlp lstm resnet20 minilm]

The files are those that evaluation_tables.py left in the benchmarks' cache, seed 0, at an eighth of the bytes; a network whose table has
not begun is left out. Every file sees the very same damaged test data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evaluation_tables import NETWORKS
from originals import cache
from results import keep, kept, record
from torch import Tensor

import featherweight
from featherweight import Task
from featherweight.comparison.judging import answers
from featherweight.data import batches
from featherweight.portable import assemble, export_graph
from featherweight.runtimes.onnxruntime import Session

NAME = "evaluation_robustness"
BUDGET, MASK_TOKEN = "8x", 103  # [MASK] of BERT's vocabulary
FAMILIES = 3  # of networks
Damage = Callable[[Any, torch.Generator], Any]


def noise(deviation: float) -> Damage:
    """Gaussian noise on every number of the input, in units of the data as the network takes them."""
    return lambda inputs, draw: inputs + deviation * torch.randn(inputs.shape, generator=draw)


def blurred(images: Tensor, draw: torch.Generator) -> Tensor:
    """A mean over 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)


def pale(images: Tensor, draw: torch.Generator) -> Tensor:
    """Half the contrast of each image."""
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) / 2


def hidden(images: Tensor, draw: torch.Generator) -> Tensor:
    """A grey square of 8 x 8 pixels somewhere in each image."""
    count, _, height, width = images.shape
    down = torch.randint(0, height - 8, (count, 1, 1), generator=draw)
    right = torch.randint(0, width - 8, (count, 1, 1), generator=draw)
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    inside = (rows >= down) & (rows < down + 8) & (columns >= right) & (columns < right + 8)
    return images.masked_fill(inside[:, None], 0.0)


def lost_frames(sounds: Tensor, draw: torch.Generator) -> Tensor:
    """A tenth of the frames is silence."""
    return sounds.masked_fill(torch.rand(*sounds.shape[:2], 1, generator=draw) < 0.1, float(sounds.min()))


def masked_words(inputs: Any, draw: torch.Generator) -> Any:
    """A tenth of the words is hidden."""
    tokens, mask = inputs
    chosen = (torch.rand(tokens.shape, generator=draw) < 0.1) & _words(mask)
    return tokens.masked_fill(chosen, MASK_TOKEN), mask


def swapped_words(inputs: Any, draw: torch.Generator) -> Any:
    """In one of five places two neighbours change their order."""
    tokens, mask = inputs
    tokens = tokens.clone()
    for place in range(1, tokens.shape[1] - 2):
        chosen = (torch.rand(len(tokens), generator=draw) < 0.2) & _words(mask)[:, place] & _words(mask)[:, place + 1]
        tokens[chosen, place : place + 2] = tokens[chosen, place : place + 2].flip(1)
    return tokens, mask


def _words(mask: Tensor) -> Tensor:
    """Real tokens but the first and the last, which are marks."""
    inside = mask.bool() & torch.roll(mask, -1, 1).bool()
    inside[:, [0, -1]] = False
    return inside


DAMAGES: dict[str, dict[str, Damage]] = {
    "mlp": {"noise 0.1": noise(0.1), "noise 0.2": noise(0.2)},
    "lstm": {"noise 0.5": noise(0.5), "noise 1": noise(1.0), "a tenth of the frames lost": lost_frames},
    "resnet20": {"noise 0.2": noise(0.2), "blurred": blurred, "half the contrast": pale, "a square hidden": hidden},
    "minilm": {"a tenth of the words hidden": masked_words, "neighbours swapped": swapped_words},
}


def damaged(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return one row a file of a network's comparison: its accuracy on the test data as they are, and damaged.

    Args:
        name: of the network.
        folder: of its comparison.
    """
    task = NETWORKS[name].task(0)
    whole = assemble(export_graph(task.model, task.data), task.model.state_dict())
    rows = [_row(name, "original", Session(whole).run, task)]
    for path in sorted((folder / "cells").glob(f"*-{BUDGET}-0.fw")):
        rows.append(_row(name, path.name.removesuffix(f"-{BUDGET}-0.fw"), featherweight.load(path).run, task))
    return rows


def _row(name: str, recipe: str, call: Callable[[Any], Any], task: Task) -> dict[str, Any]:
    scores = {"as it is": 100 * answers(call, task.model, task.data).score.value}
    for label, damage in DAMAGES[name].items():
        draw = torch.Generator().manual_seed(0)  # the same damage for every file
        worse = [(damage(inputs, draw), target) for inputs, target in batches(task.data.test, "test")]
        scores[label] = (
            100 * answers(call, task.model, featherweight.Data(**{**vars(task.data), "test": worse})).score.value
        )
    told = "; ".join(f"{label} {score:.2f}" for label, score in scores.items())
    return {"network": name, "recipe": recipe, "accuracy %": told}


def main() -> None:
    """Measure the named networks whose tables have begun, and write the row."""
    done = kept(NAME)
    for name in sys.argv[1:] or DAMAGES:
        folder = cache() / f"compare-{name}"
        if folder.exists():
            done[name] = damaged(name, folder)
            keep(NAME, done)
    rows = [row for name in DAMAGES for row in done.get(name, [])]
    count = sum(row["recipe"] != "original" for row in rows)
    note = f"{count} files at {BUDGET}, seed 0, on {', '.join(done) or 'no network yet'}; the same damage for each file"
    got = count if len(done) >= FAMILIES else None
    note += "" if got else f"; {len(done)} of {FAMILIES} families of networks so far, so nothing is counted"
    record(NAME, "evaluation.robustness.rows", got, 1, note, {"table": rows})


if __name__ == "__main__":
    main()
