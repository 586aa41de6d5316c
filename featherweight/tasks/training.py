"""What ready-made tasks share: fast loaders over tensors, and training the original through the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from featherweight.data import Data
from featherweight.technique import Context
from featherweight.techniques.seeding import seeded
from featherweight.techniques.train import Training, fit


def tensor_loader(inputs: Tensor, targets: Tensor, batch: int, shuffle: bool = False) -> DataLoader[Any]:
    """Return a loader over tensors in memory that fetches whole batches at once, `[batch, ...]` and `[batch]`.

    Args:
        inputs: `[n, ...]`.
        targets: `[n]`.
        batch: samples a batch; the last may be smaller.
        shuffle: a new order each time it is read.
    """
    samples = TensorDataset(inputs, targets)
    order: Any = RandomSampler(samples) if shuffle else SequentialSampler(samples)
    return DataLoader(samples, sampler=BatchSampler(order, batch, drop_last=False), batch_size=None)


def trained(
    network: Callable[[], nn.Module],
    data: Data,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 1e-2,
) -> nn.Module:
    """Return `network()` initialised and trained under a seed, in evaluation mode, the best epoch on validation data.

    Args:
        network: builds the untrained model.
        data: with `train` and `validate`.
        epochs: passes over the training loader.
        learning_rate: peak rate.
        seed: of the initialisation and the order of the batches.
        weight_decay: of AdamW.
    """
    with seeded(seed):
        model = network()
    fit(model, Context(data=data, seed=seed, step="train"), Training(epochs, learning_rate, weight_decay=weight_decay))
    return model.eval()
