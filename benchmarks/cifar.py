"""CIFAR-10 (JPEG copy): the development data set of `shared/data`, decoded once, with the usual crop-and-flip."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from featherweight import Data
from featherweight.tasks.training import tensor_loader

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HELD_OUT = 500  # the last of each class validate


def folder() -> Path:
    """Return the data folder that `FEATHERWEIGHT_DATA` names."""
    return Path(os.environ["FEATHERWEIGHT_DATA"])


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
        return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(
            0, 3, 1, 2
        ).contiguous(), labels


def data(normalise: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET, batch: int = 128) -> Data:
    """Return the data set, normalised, with the last 500 of each training class to validate."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in normalise)
    (images, labels), (test, test_labels) = _decoded("train"), _decoded("test")
    images, test = (images.float() / 255 - mean) / deviation, (test.float() / 255 - mean) / deviation
    held = torch.cat([torch.nonzero(labels == label).flatten()[-HELD_OUT:] for label in range(10)]).sort().values
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[held] = False
    samples = Augmented(images[kept], labels[kept])
    return Data(
        example=images[:1],
        train=DataLoader(
            samples, sampler=BatchSampler(RandomSampler(samples), batch, drop_last=False), batch_size=None
        ),
        calibrate=tensor_loader(images[kept][:1024], labels[kept][:1024], batch),
        validate=tensor_loader(images[held], labels[held], 500),
        test=tensor_loader(test, test_labels, 500),
    )
