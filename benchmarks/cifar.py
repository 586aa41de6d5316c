"""CIFAR-10 (JPEG copy), decoded once, with the usual crop-and-flip, and the baselines `resnet20`, `resnet56` and `vgg19`.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/cifar.py resnet56
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from networks import resnet20, resnet56, vgg19
from originals import device, folder, original
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from featherweight import Data, Task
from featherweight.scoring import evaluate
from featherweight.tasks.training import tensor_loader
from featherweight.techniques.train import Training

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
HELD_OUT = 500  # the last of each class validate
NETWORKS = {"resnet20": (resnet20, IMAGENET), "resnet56": (resnet56, IMAGENET), "vgg19": (vgg19, CIFAR)}
TUNE = Training(epochs=2, learning_rate=1e-3)


@cache
def _decoded(part: str) -> tuple[Tensor, Tensor]:
    with np.load(folder() / "cifar10_jpeg.npz", allow_pickle=False) as arrays:
        blob, offset = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_offset"]
        labels = torch.from_numpy(arrays[f"{part}_label"].astype(np.int64))
    images = [np.asarray(Image.open(io.BytesIO(blob[a:b])).convert("RGB")) for a, b in pairwise(offset)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


class Augmented(TensorDataset):
    """Images `[n, 3, 32, 32]`; a list of indices gives a batch, each image shifted by up to 4 pixels and flipped at random."""

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return the batch and its labels."""
        images, labels = super().__getitem__(index)
        count = len(images)
        padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
        down, right = torch.randint(0, 9, (2, count, 1, 1))
        steps = torch.arange(32)
        columns = torch.where(torch.rand(count, 1, 1) < 0.5, right + steps, right + steps.flip(0))
        rows = down + steps[:, None]
        places = (place.to(images.device) for place in (torch.arange(count)[:, None, None], rows, columns))
        moved = padded.permute(0, 2, 3, 1)[tuple(places)]
        # left with channels last in memory: ResNets train 1.2 times as fast, VGG-19 twice
        return moved.permute(0, 3, 1, 2), labels


def data(normalise: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET, batch: int = 128) -> Data:
    """Return the data set, normalised, with the last 500 of each training class to validate."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in normalise)
    (images, labels), (test, test_labels) = _decoded("train"), _decoded("test")
    images, test = (images.float() / 255 - mean) / deviation, (test.float() / 255 - mean) / deviation
    held = torch.cat([torch.nonzero(labels == label).flatten()[-HELD_OUT:] for label in range(10)]).sort().values
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    samples = Augmented(images[kept].to(device()), labels[kept].to(device()))
    # the file is sorted by class, and a few batches must show them all
    some = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:1024]
    return Data(
        example=images[:1],
        train=DataLoader(
            samples, sampler=BatchSampler(RandomSampler(samples), batch, drop_last=False), batch_size=None
        ),
        calibrate=tensor_loader(images[kept][some], labels[kept][some], batch),
        validate=tensor_loader(images[held], labels[held], 500),
        test=tensor_loader(test, test_labels, 500),
    )


def task(name: str, seed: int = 0) -> Task:
    """Return a baseline and its data: VGG-19 as it was trained on them, a ResNet after two epochs of fine-tuning on them.

    Args:
        name: `"resnet20"`, `"resnet56"` or `"vgg19"`.
        seed: of the fine-tuning; VGG-19 has none.
    """
    build, normalise = NETWORKS[name]
    images, pretrained = data(normalise), partial(build, folder())
    return Task(pretrained() if name == "vgg19" else original(name, seed, pretrained, images, TUNE), images, name)


class _Half:
    """Every second batch of a loader, from the first or the second on: of images sorted by class, 500 of each class's 1,000."""

    def __init__(self, loader: Any, start: int) -> None:
        self.loader, self.start = loader, start

    def __len__(self) -> int:
        return len(self.loader) // 2

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.start, None, 2)


def judged(name: str, seed: int = 0) -> Task:
    """Return `task(name, seed)`, half of whose test data validate: for VGG-19, whose published weights have seen all training data."""
    made = task(name, seed)
    halves = {part: _Half(made.data.test, start) for start, part in enumerate(("validate", "test"))}
    return replace(made, data=replace(made.data, **halves))


def main() -> None:
    """Fine-tune or load the networks named on the command line, and print their accuracies."""
    for name in sys.argv[1:] or NETWORKS:
        made = task(name)
        scores = [f"{split} {evaluate(made.model, made.data, split).value:.4f}" for split in ("validate", "test")]
        sys.stdout.write(f"{name}, seed 0: {', '.join(scores)}\n")


if __name__ == "__main__":
    main()
