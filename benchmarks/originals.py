"""The benchmarks' originals: trained once through the one training loop, then read from a folder outside the repository.

`FEATHERWEIGHT_DATA` names the folder of the development data, `FEATHERWEIGHT_CACHE` the one of the trained originals
(`~/.cache/featherweight-bench` when missing), `FEATHERWEIGHT_DEVICE` what trains (the CPU when missing, or `cuda`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from featherweight import Context, Data
from featherweight.data import tensors
from featherweight.edits import named_tensors
from featherweight.techniques.seeding import seeded
from featherweight.techniques.train import Training, fit


def folder() -> Path:
    """Return the data folder that `FEATHERWEIGHT_DATA` names."""
    return Path(os.environ["FEATHERWEIGHT_DATA"])


def cache() -> Path:
    """Return the folder of the trained originals; it need not exist."""
    return Path(os.environ.get("FEATHERWEIGHT_CACHE", "~/.cache/featherweight-bench")).expanduser()


def device() -> torch.device:
    """Return where networks are trained; files are written, read and timed on the CPU."""
    return torch.device(os.environ.get("FEATHERWEIGHT_DEVICE", "cpu"))


def trainer() -> str:
    """Return the name of what trains, for a note."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "CPU"


def original(name: str, seed: int, build: Callable[[], nn.Module], data: Data, training: Training) -> nn.Module:
    """Return a network in evaluation mode, trained, or read from the cache if it was trained so before.

    A killed training goes on from its last epoch. Two processes that want the same network train it once.

    Args:
        name: of the network; the file is called after it, the seed and a digest of what the result depends on.
        seed: of the initialisation, the batches and their augmentation.
        build: returns the network before training, pretrained or not; called under the seed.
        data: with `train` and `validate`; the best epoch on `validate` is kept.
        training: how long and how.
    """
    with seeded(seed):
        model = build()
    path = cache() / f"{name}-{seed}-{_digest(model, data, training)}.safetensors"
    with _alone(path.with_suffix(".lock")):
        if not path.exists():
            workspace, started = path.with_suffix(".run"), time.perf_counter()

            def say(message: str, _: float) -> None:
                sys.stderr.write(f"{message}, {time.perf_counter() - started:.0f} s\n")

            context = Context(data, None, device(), seed, workspace=workspace, report=say, step=f"{name} {seed}")
            fit(model.to(device()), context, training)
            model.cpu()
            say(f"{name} {seed}: trained", 1.0)
            save_model(model, str(path.with_suffix(".part")), {"training": repr(training)})
            os.replace(path.with_suffix(".part"), path)
            shutil.rmtree(workspace)
    load_model(model, path)
    return model.eval()


def _digest(model: nn.Module, data: Data, training: Training) -> str:
    """Hash the settings, the network before training and the first batch as it is trained on, augmentation included.

    Of computed inputs only coarse moments count, because their last bits depend on the machine and its threads.
    """
    with seeded(0):
        first = next(iter(data.train or ()))
    digest = hashlib.sha256(f"{training} {model}".encode())
    for tensor in named_tensors(model).values():
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for tensor in tensors(first):
        values = tensor.double()
        digest.update(f"{list(tensor.shape)} {values.mean():.2f} {values.std():.2f}".encode())
    return digest.hexdigest()[:12]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
