"""A few values for many weights: k-means on a line, and its entropy-constrained form."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 50
_AT_ONCE = 1 << 24  # costs held at a time


def kmeans(values: Tensor, worth: Tensor, count: int) -> Tensor:
    """Return `count` centroids, ascending, float64, at a local minimum of the sum of `worth (value - centroid)^2`.

    They start at even distances over the range (Han, Mao & Dally, "Deep Compression", ICLR 2016); a cluster that is empty
    keeps its place.

    Args:
        values: `[n]` float64.
        worth: what the square of an error costs at each, `[n]` float64.
        count: 1 or more.
    """
    ordered, order = values.sort()
    zero = values.new_zeros(1)
    weights = torch.cat([zero, worth[order].cumsum(0)])
    sums = torch.cat([zero, (worth[order] * ordered).cumsum(0)])
    centroids = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
    for _ in range(_ROUNDS):
        ends = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        mass, moment = weights[ends[1:]] - weights[ends[:-1]], sums[ends[1:]] - sums[ends[:-1]]
        moved = torch.where(mass > 0, moment / mass.clamp_min(torch.finfo(torch.float64).tiny), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def entropy_constrained(values: Tensor, worth: Tensor, centroids: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return centroids and the place of each value's, at a local minimum of `worth (value - centroid)^2 - rate log2 p`.

    `p` is the share of the values that have the same centroid (Chou, Lookabaugh & Gray, "Entropy-Constrained Vector
    Quantization", 1989; for networks: Choi, El-Khamy & Lee, "Towards the Limit of Network Quantization", ICLR 2017).

    Args:
        values: `[n]` float64.
        worth: what the square of an error costs at each, `[n]` float64.
        centroids: to start from, `[count]` float64; one whose share has become zero stays where it is.
        rate: what a bit costs, in the unit of the errors.
    """
    places = _cheapest(values, worth, centroids, torch.zeros_like(centroids))
    for _ in range(_ROUNDS):
        shares = torch.bincount(places, minlength=len(centroids)).double() / len(values)
        before = places
        places = _cheapest(values, worth, centroids, -rate * torch.log2(shares))
        mass = torch.zeros_like(centroids).index_add_(0, places, worth)
        moment = torch.zeros_like(centroids).index_add_(0, places, worth * values)
        centroids = torch.where(mass > 0, moment / mass.clamp_min(torch.finfo(torch.float64).tiny), centroids)
        if torch.equal(places, before):
            break
    return centroids, places


def _cheapest(values: Tensor, worth: Tensor, centroids: Tensor, costs: Tensor) -> Tensor:
    chunk = max(1, _AT_ONCE // len(centroids))
    parts = zip(torch.split(values, chunk), torch.split(worth, chunk), strict=True)
    return torch.cat([(w[:, None] * (v[:, None] - centroids).square() + costs).argmin(1) for v, w in parts])
