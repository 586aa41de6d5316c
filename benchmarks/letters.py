"""LetterRecognition (Frey & Slate, 1991; UCI), 16 integer attributes of 26 letters, and the baseline `mlp`.

The data set is a file of the Debian package r-cran-mlbench, which is fetched and unpacked once; nothing of R is needed.
`FEATHERWEIGHT_LETTERS` names the file where there is no apt.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import rdata
import torch
from originals import cache, original
from torch import Tensor, nn

from featherweight import Data, Task
from featherweight.tasks.training import tensor_loader
from featherweight.techniques.train import Training

FILE = "usr/lib/R/site-library/mlbench/data/LetterRecognition.rda"
CLASSES, ATTRIBUTES = 26, 16
SPLITS = (14_000, 3_000, 3_000)  # train, validate, test: 70/15/15
BATCH = 128
TRAINING = Training(epochs=60, learning_rate=3e-3, weight_decay=0.1)


def mlp() -> nn.Module:
    """Return the untrained baseline 16-256-256-26, ReLU; 76,826 parameters, input `[n, 16]`."""
    return nn.Sequential(nn.Linear(ATTRIBUTES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def _file() -> Path:
    """The file, as named, installed or fetched."""
    if "FEATHERWEIGHT_LETTERS" in os.environ:
        return Path(os.environ["FEATHERWEIGHT_LETTERS"])
    folder = cache() / "mlbench"
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "r-cran-mlbench"], cwd=folder, check=True)
        subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")), folder], check=True)
    return folder / FILE


def samples() -> tuple[Tensor, Tensor]:
    """Return the attributes `[20000, 16]`, 0 to 15 scaled to -1 to 1, and the labels `[20000]`, in a fixed random order."""
    frame = rdata.read_rda(_file(), default_encoding="ascii")["LetterRecognition"]
    labels = torch.tensor([ord(letter) - ord("A") for letter in frame["lettr"]])
    inputs = torch.tensor(frame.drop(columns="lettr").to_numpy("float32")) / 7.5 - 1
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return inputs[order], labels[order]


def data(batch: int = 256) -> Data:
    """Return the data, split 70/15/15 by a fixed permutation.

    Args:
        batch: samples of a training batch.
    """
    parts = [part.split(SPLITS) for part in samples()]
    (train, validate, test), (labels, validate_labels, test_labels) = parts
    return Data(
        example=train[:1],
        train=tensor_loader(train, labels, batch, shuffle=True),
        calibrate=tensor_loader(train, labels, 1000),
        validate=tensor_loader(validate, validate_labels, 3000),
        test=tensor_loader(test, test_labels, 3000),
    )


def task(seed: int = 0) -> Task:
    """Return the MLP, trained or read from the cache, and its data."""
    letters = data(BATCH)
    return Task(original("letters_mlp", seed, mlp, letters, TRAINING), letters, "mlp")
