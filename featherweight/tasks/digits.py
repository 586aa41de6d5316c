"""The embedded default task: scikit-learn's 1,797 images of digits, 8 x 8 pixels, and a small CNN trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from featherweight.data import Data, Task
from featherweight.errors import need
from featherweight.tasks.training import tensor_loader, trained

SPLITS = (1078, 359, 360)  # train, validate, test: 60/20/20


def network() -> nn.Module:
    """Return the untrained CNN: conv 32, conv 64, pool, linear 128, linear 10; 151,306 parameters, input `[n, 1, 8, 8]`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class ShiftedImages(TensorDataset):
    """Images `[n, 1, 8, 8]` and labels `[n]`; a list of indices gives a batch, each image moved by up to a pixel at random."""

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """Return the batch `[len(index), 1, 8, 8]` and its labels."""
        images, labels = self.tensors[0][index], self.tensors[1][index]
        padded = nn.functional.pad(images, (1, 1, 1, 1))
        down, right = torch.randint(0, 3, (2, len(images), 1, 1))
        steps = torch.arange(8)
        rows, columns = down + steps[:, None], right + steps
        return padded[torch.arange(len(images))[:, None, None], 0, rows, columns].unsqueeze(1), labels


def task_data() -> Data:
    """Return the data, split 60/20/20 by a fixed permutation.

    Raises:
        ExportError: scikit-learn is not installed.
    """
    bunch = need("sklearn.datasets", "tasks", "the digits task").load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validate, test = torch.split(order, list(SPLITS))
    samples = ShiftedImages(images[train], labels[train])
    return Data(
        example=images[:1],
        train=DataLoader(samples, sampler=BatchSampler(RandomSampler(samples), 64, drop_last=False), batch_size=None),
        calibrate=tensor_loader(images[train], labels[train], 64),
        validate=tensor_loader(images[validate], labels[validate], 360),
        test=tensor_loader(images[test], labels[test], 360),
    )


def task(seed: int = 0) -> Task:
    """Return the CNN, trained in seconds, and its data.

    Raises:
        ExportError: scikit-learn is not installed.
    """
    data = task_data()
    return Task(trained(network, data, epochs=60, learning_rate=3e-3, seed=seed), data, "digits")
