"""LeNet-300-100 and LeNet-5-Caffe on full MNIST in as few bytes as their published error limits allow.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/bytes_lenet.py [--network lenet300] [--seeds 3] [--rates 0.1 0.2]

Gradual pruning of LeNet-300-100, channels of LeNet-5-Caffe cut at once, entropy-penalized training at one rate or several, and out
go the units that nothing reads. Both train on digits moved by up to a pixel, after a teacher that knows what they are: LeNet-5-Caffe for
LeNet-300-100, and for LeNet-5-Caffe the mean of the originals of all three seeds, which have learnt moved digits too, and which is
asked about each image and move once.
Files are saved, read back into a fresh network of the original class, and scored. Validation data choose among the rates of a seed:
the smallest file within the limit, or where none is, the one that errs least. Test data judge: the mean error of the seeds. The
published records count no graph, so neither does the ratio; the whole file's bytes are beside it. A rate that is done is kept; a
killed training goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from originals import cache, device, original, trainer
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Context, Data, Recipe
from featherweight.artifact import load, package
from featherweight.costs import original_bytes
from featherweight.ensembles import ensemble
from featherweight.portable import export_graph
from featherweight.running import run
from featherweight.scoping import only
from featherweight.scoring import evaluate
from featherweight.tasks.mnist import data, lenet5, lenet300
from featherweight.technique import Technique
from featherweight.techniques import Distill, PenalizeEntropy, PruneChannels, PruneDeadUnits, PruneWeights
from featherweight.techniques.train import Training

NAME = "bytes_lenet"
SEEDS = 3  # that a figure is of


def moved(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return images `[n, 1, 28, 28]` moved by 0 to 2 pixels less one each, `down` and `right` being `[n]`."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))[:, 0]
    rows, columns = (start[:, None, None] + torch.arange(28) for start in (down, right))
    return padded[torch.arange(len(images))[:, None, None], rows.mT, columns][:, None]


class Moved:
    """Batches whose images are each moved by up to a pixel in both directions."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield moved(images, *torch.randint(0, 3, (2, len(images)))), labels


class Remembered(nn.Module):
    """A teacher that knows every move of some images by heart: on two cores, asking it takes longer than teaching does.

    Args:
        teacher: in evaluation mode, is asked about everything else.
        images: `[n, 1, 28, 28]`.
    """

    answers: Tensor

    def __init__(self, teacher: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.teacher = teacher
        self._places: dict[bytes, int] = {}
        found, count = [], itertools.count()
        for down, right in itertools.product(range(3), repeat=2):
            for batch in images.split(1000):
                asked = moved(batch, torch.full((len(batch),), down), torch.full((len(batch),), right))
                self._places.update(zip(_keys(asked), count, strict=False))
                with torch.no_grad():
                    found.append(teacher(asked))
        self.register_buffer("answers", torch.cat(found))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, 10]`."""
        places = [self._places.get(key) for key in _keys(images)]
        known = [place for place in places if place is not None]
        return self.answers[known] if len(known) == len(places) else self.teacher(images)


def _keys(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=12).digest() for image in images.contiguous().cpu().numpy()]


@dataclass(frozen=True)
class Network:
    """One of the two networks, and how it is made small.

    Attributes:
        build: returns it untrained.
        training: of the original, as other benchmarks have it.
        limit: largest error in per cent.
        pruning: what cuts its units and zeros its weights first.
        rates: what a bit costs, from mild to strong.
        epochs: of the training for bytes.
    """

    build: Callable[[], nn.Module]
    training: Training
    limit: float
    pruning: tuple[Technique, ...]
    rates: tuple[float, ...]
    epochs: int = 20

    def penalty(self, rate: float) -> Technique:
        """Return the training that follows."""
        return PenalizeEntropy(self.epochs, learning_rate=2e-3, rate=rate, bits=4)


def _cut(ratio: float) -> PruneChannels:
    return PruneChannels(ratio=ratio, importance="taylor", reconstruct=True)


NETWORKS = {
    "lenet300": Network(
        lenet300,
        Training(epochs=20, learning_rate=1e-3, weight_decay=5e-2),
        1.9,
        (PruneWeights(ratio=0.95, ranking="lamp", epochs=10, learning_rate=2e-3),),
        (0.6, 1.5),
    ),
    "lenet5": Network(
        lenet5,
        Training(epochs=12, learning_rate=1e-3, weight_decay=5e-2),
        1.0,
        (
            *(only(layer, _cut(ratio)) for layer, ratio in (("0", 0.5), ("2", 0.6), ("5", 0.944))),  # to 10, 20 and 28
            Distill(epochs=8, learning_rate=2e-3),
        ),
        (0.08,),
        epochs=120,
    ),
}


def main() -> None:
    """Train what is missing and write the rows of the networks that are done."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--network", choices=tuple(NETWORKS), nargs="*", default=list(NETWORKS))
    asked.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    asked.add_argument("--rates", type=float, nargs="*", default=None)
    options = asked.parse_args()
    mnist, done = data(), kept(NAME)
    for name in options.network:
        for seed in options.seeds:
            for rate in options.rates or NETWORKS[name].rates:
                key = f"{name} {seed} {rate:g}"
                if key not in done:
                    found = cell(name, seed, rate, mnist)
                    done = {**kept(NAME), key: found}
                    keep(NAME, done)
                _say(f"{key}: {done[key]}")
        cells = {key: value for key, value in done.items() if key.startswith(f"{name} ")}
        row(name, cells)


def cell(name: str, seed: int, rate: float, mnist: Data) -> dict[str, Any]:
    """Return bytes and errors of one network at one rate."""
    network = NETWORKS[name]
    model = original(name, seed, network.build, mnist, network.training) if name == "lenet300" else member(seed, mnist)
    teacher = original("lenet5", 0, lenet5, mnist, NETWORKS["lenet5"].training) if name == "lenet300" else remembered()
    model = model.to(memory_format=torch.channels_last)  # in which a CPU pools and convolves twice as fast
    moving = dataclasses.replace(mnist, train=Moved(mnist.train))
    teacher = copy.deepcopy(teacher).to(device())
    context = Context(moving, teacher, device(), seed, report=_report, workspace=cache() / NAME)
    recipe = Recipe((*network.pruning, network.penalty(rate)))
    small, edits = run(recipe, model, context)
    small, cuts = run(PruneDeadUnits(), small, context)
    edits = [*edits, *cuts]
    small.cpu()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.fw"
        size = package(small, edits, {}, None).save(path, graph=False)
        back = load(path, into=network.build().eval())
    whole = len(package(small, edits, {}, export_graph(small, mnist)).to_bytes())
    errors = {part: 100 * (1 - evaluate(back, mnist, part).value) for part in ("validate", "test")}
    return {
        "file_bytes": size,
        "whole_file_bytes": whole,
        "original_bytes": original_bytes(model),
        "ratio": round(original_bytes(model) / size, 2),
        **{f"{part}_error": round(error, 3) for part, error in errors.items()},
        "original_test_error": round(100 * (1 - evaluate(model, mnist, "test").value), 3),
        "recipe": str(recipe),
        "trained_on": trainer(),
        "sizes": [list(value.shape) for value in small.state_dict().values() if value.dim() > 1],
    }


@functools.cache
def remembered() -> Remembered:
    """Return the mean of the originals of LeNet-5-Caffe, asked about all training images."""
    mnist = data()
    members = [member(seed, mnist) for seed in range(SEEDS)]
    teacher = ensemble(members).to(memory_format=torch.channels_last).eval()
    return Remembered(teacher, mnist.train.dataset.tensors[0])  # type: ignore[union-attr]


def member(seed: int, mnist: Data) -> nn.Module:
    """Return LeNet-5-Caffe trained on moved digits."""
    moving = dataclasses.replace(mnist, train=Moved(mnist.train))
    return original("lenet5-moved", seed, lenet5, moving, NETWORKS["lenet5"].training)


def row(name: str, cells: dict[str, dict[str, Any]]) -> None:
    """Write the row of a network: the mean over three seeds, or nothing where their mean test error is beyond the limit."""
    limit, chosen = NETWORKS[name].limit, {}
    for seed in sorted({key.split()[1] for key in cells}):
        own = {key: value for key, value in cells.items() if key.split()[1] == seed}
        chosen[seed] = min(own.items(), key=lambda item: _rank(item[1], limit))
    errors = [value["test_error"] for _, value in chosen.values()]
    holds = len(chosen) >= SEEDS and statistics.mean(errors) <= limit
    got = statistics.mean(value["ratio"] for _, value in chosen.values()) if holds else None
    note = (
        f"{len(chosen)} seeds, mean test error {statistics.mean(errors):.2f} % of at most {limit} %; original bytes over the file's "
        "without its graph, mean; rates chosen by validation error: "
        + "; ".join(
            f"{key}: {value['file_bytes']} bytes ({value['whole_file_bytes']} with the graph), {value['ratio']}x, "
            f"test error {value['test_error']} %, of the original {value['original_test_error']} %"
            for key, value in chosen.values()
        )
    )
    identifier = f"bytes.{name}.ratio"
    record(NAME, identifier, None if got is None else round(got, 1), len(chosen), note, cells)


def _rank(found: dict[str, Any], limit: float) -> tuple[float, int]:
    """What is within the limit on validation data comes first, by its size; after it the rest, by its error."""
    return max(0.0, found["validate_error"] - limit), found["file_bytes"]


def _report(message: str, share: float) -> None:
    sys.stderr.write(f"{message}\n")


def _say(message: str) -> None:
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
