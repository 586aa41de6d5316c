"""Whether a difference is one: McNemar's test, paired bootstrap intervals, and how well confidence is calibrated."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_RESAMPLES = 2000
_BINS = 15


def mcnemar(before: Tensor, after: Tensor) -> float:
    """Return the p-value of McNemar's exact test: how likely so unequal flips would be if both were equally good.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.

    Args:
        before: 1 where the first model is right and 0 where it is wrong, `[n]`.
        after: the second model's, on the same samples.
    """
    lost = int(((before == 1) & (after == 0)).sum())
    won = int(((before == 0) & (after == 1)).sum())
    flips = lost + won
    if not flips:
        return 1.0
    tail = sum(math.comb(flips, count) for count in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def bootstrap(differences: Tensor, share: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of a mean paired difference; runs and samples are both drawn again.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        differences: one row a run of another seed, one column a sample of the same test data, `[runs, n]` or `[n]`.
        share: of the resampled means that lie inside.
        seed: of the resampling.
    """
    rows = np.atleast_2d(differences.detach().double().cpu().numpy())
    rng = np.random.default_rng(seed)
    runs, count = rows.shape
    means = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        drawn = rows[rng.integers(0, runs, runs)].mean(0)
        means[index] = drawn[rng.integers(0, count, count)].mean()
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Return the expected calibration error, 0 to 1: how far the share of right answers is from the stated confidence.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: 15 bins of equal width.

    Args:
        confidence: the probability of the chosen class, `[n]`.
        right: 1 where the chosen class is the label, `[n]`.
    """
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    error = 0.0
    for index in range(_BINS):
        inside = bins == index
        if bool(inside.any()):
            gap = float(right[inside].double().mean() - confidence[inside].double().mean())
            error += abs(gap) * float(inside.double().mean())
    return error


def damage_by_class(before: Tensor, after: Tensor, labels: Tensor) -> list[float | None]:
    """Return by how much the share of right answers fell, for each class; None for one without samples.

    Args:
        before: the original's score of each sample, `[n]`.
        after: the compressed model's.
        labels: `[n]`, whole numbers from 0.
    """
    found: list[float | None] = []
    for label in range(int(labels.max()) + 1 if len(labels) else 0):
        inside = labels == label
        found.append(float((before[inside] - after[inside]).double().mean()) if bool(inside.any()) else None)
    return found


def binary(samples: Tensor) -> bool:
    """Return whether every value is 0 or 1, as McNemar's test wants them."""
    return bool(torch.isin(samples, torch.tensor([0.0, 1.0], dtype=samples.dtype)).all())
