"""MNIST with the two networks the compression papers use: LeNet-300-100 and LeNet-5-Caffe (LeCun et al., 1998)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from featherweight.data import Data, Task
from featherweight.errors import DataError
from featherweight.tasks.training import tensor_loader, trained

FILE = "mnist.npz"
HELD_OUT = 5_000  # the last of the training set validate


def lenet300() -> nn.Module:
    """Return the untrained perceptron 784-300-100-10; 266,610 parameters, input `[n, 1, 28, 28]`."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5() -> nn.Module:
    """Return the untrained LeNet-5-Caffe, 20 and 50 filters of 5 x 5; 431,080 parameters, input `[n, 1, 28, 28]`."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def data(folder: str | Path | None = None, batch: int = 128) -> Data:
    """Return MNIST from `mnist.npz` as Keras ships it (`x_train`, `y_train`, `x_test`, `y_test`).

    Args:
        folder: where the file is; the environment variable `FEATHERWEIGHT_DATA` when missing.
        batch: samples a batch.

    Raises:
        DataError: there is no such file; the message says where it was looked for.
    """
    path = Path(folder or os.environ.get("FEATHERWEIGHT_DATA", ".")) / FILE
    if not path.exists():
        raise DataError(f"{path} does not exist: put Keras's {FILE} there, or set FEATHERWEIGHT_DATA to its folder")
    with np.load(path, allow_pickle=False) as arrays:
        images = {part: torch.from_numpy(arrays[f"x_{part}"]).float().unsqueeze(1) / 255 for part in ("train", "test")}
        labels = {part: torch.from_numpy(arrays[f"y_{part}"]).long() for part in ("train", "test")}
    kept = len(images["train"]) - HELD_OUT
    return Data(
        example=images["train"][:1],
        train=tensor_loader(images["train"][:kept], labels["train"][:kept], batch, shuffle=True),
        calibrate=tensor_loader(images["train"][:1024], labels["train"][:1024], batch),
        validate=tensor_loader(images["train"][kept:], labels["train"][kept:], 1000),
        test=tensor_loader(images["test"], labels["test"], 1000),
    )


def lenet300_task(seed: int = 0) -> Task:
    """Return LeNet-300-100 trained on MNIST, and its data.

    Raises:
        DataError: the data is not there.
    """
    mnist = data()
    return Task(
        trained(lenet300, mnist, epochs=20, learning_rate=1e-3, seed=seed, weight_decay=5e-2), mnist, "lenet300"
    )


def lenet5_task(seed: int = 0) -> Task:
    """Return LeNet-5-Caffe trained on MNIST, and its data.

    Raises:
        DataError: the data is not there.
    """
    mnist = data()
    return Task(trained(lenet5, mnist, epochs=12, learning_rate=1e-3, seed=seed, weight_decay=5e-2), mnist, "lenet5")
