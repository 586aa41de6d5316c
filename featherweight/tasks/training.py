"""Train a ready-made task's original network through the one training loop."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from featherweight.data import Data
from featherweight.technique import Context
from featherweight.techniques.train import Training, fit, seeded


def trained(network: Callable[[], nn.Module], data: Data, *, epochs: int, learning_rate: float, seed: int) -> nn.Module:
    """Return `network()` initialised and trained under a seed, in evaluation mode, the best epoch on validation data.

    Args:
        network: builds the untrained model.
        data: with `train` and `validate`.
        epochs: passes over the training loader.
        learning_rate: peak rate.
        seed: of the initialisation and the order of the batches.
    """
    with seeded(seed):
        model = network()
    fit(model, Context(data=data, seed=seed, step="train"), Training(epochs, learning_rate, weight_decay=1e-2))
    return model.eval()
