"""The embedded default task: scikit-learn's 1,797 images of digits, 8 x 8 pixels, and a small CNN trained on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featherweight.data import Data, Task
from featherweight.errors import need
from featherweight.tasks.training import trained

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


def shifted(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate training samples, each moved by up to one pixel in both directions at random."""
    images = []
    for image, _ in batch:
        down, right = torch.randint(0, 3, (2,)).tolist()
        padded = nn.functional.pad(image, (1, 1, 1, 1))
        images.append(padded[:, down : down + 8, right : right + 8])
    return torch.stack(images), torch.stack([label for _, label in batch])


def task(seed: int = 0) -> Task:
    """Return the trained CNN and its data, split 60/20/20 by a fixed permutation; trains in seconds.

    Raises:
        ExportError: scikit-learn is not installed.
    """
    bunch = need("sklearn.datasets", "tasks", "the digits task").load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, validate, test = (TensorDataset(images[part], labels[part]) for part in order.split(SPLITS))
    data = Data(
        example=images[:1],
        train=DataLoader(train, batch_size=64, shuffle=True, collate_fn=shifted),
        calibrate=DataLoader(train, batch_size=64),
        validate=DataLoader(validate, batch_size=360),
        test=DataLoader(test, batch_size=360),
    )
    return Task(trained(network, data, epochs=60, learning_rate=3e-3, seed=seed), data, "digits")
