"""How much each weight, or block of weights, matters, and which of them stay."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.techniques.patterns import Blocks, KeepOf, Pattern, block_norms, keep_of, spread

_ANYWHERE = Blocks()


def lamp(weight: Tensor) -> Tensor:
    """Layer-adaptive magnitude score, shaped like `weight`: `w^2` over the sum of all squares at least as large.

    It makes weights of different layers comparable, so that one global threshold empties no layer.
    Paper: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021.
    """
    squares = weight.detach().double().flatten() ** 2
    ordered, order = squares.sort()
    remaining = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = ordered / remaining.clamp_min(1e-300)
    return scores.reshape(weight.shape)


def erk_densities(weights: dict[str, Tensor], density: float) -> dict[str, float]:
    """Return the share of each tensor to keep, 0 to 1, so that `density` of all weights stay.

    It is in proportion to the sum of the tensor's dimensions over their product; what a tensor cannot take, being full,
    the others share in the same proportion. Paper: Evci et al., "Rigging the Lottery", ICML 2020 (Erdos-Renyi-Kernel).
    """
    budget = density * sum(weight.numel() for weight in weights.values())
    shares = {name: float(sum(weight.shape)) / weight.numel() for name, weight in weights.items()}
    full: set[str] = set()
    while True:
        rest = budget - sum(weights[name].numel() for name in full)
        asked = sum(shares[name] * weights[name].numel() for name in weights if name not in full)
        densities = {name: 1.0 if name in full else shares[name] * rest / asked for name in weights}
        over = {name for name in weights if name not in full and densities[name] > 1.0}
        if not over:
            return densities
        full |= over


def masks_at(weights: dict[str, Tensor], ratio: float, ranking: str, pattern: Pattern = _ANYWHERE) -> dict[str, Tensor]:
    """Return a boolean mask for each weight that removes a share `ratio` of all of them, the least important first.

    Args:
        weights: by name, any shapes of two dimensions or more where the pattern is not any weight.
        ratio: share removed, 0 to 1; of blocks, where the pattern has them.
        ranking: `"layer"` compares magnitudes within each tensor, `"global"` over all, `"lamp"` their LAMP scores over
            all; `"erk"` compares within each tensor, whose density is Erdos-Renyi-Kernel.
        pattern: where zeros may stand; n:m takes its share from every row, and no ranking changes that.
    """
    if isinstance(pattern, KeepOf):
        return {name: keep_of(weight.detach().abs(), ratio, pattern.group) for name, weight in weights.items()}
    if pattern == _ANYWHERE:
        scores = {name: weight.detach().abs().double() for name, weight in weights.items()}
    else:
        scores = {name: block_norms(weight, pattern) for name, weight in weights.items()}
    if ranking == "erk":
        densities = erk_densities(weights, 1 - ratio)
        masks = {name: largest(score, 1 - densities[name]) for name, score in scores.items()}
    elif ranking == "layer":
        masks = {name: largest(score, ratio) for name, score in scores.items()}
    else:
        masks = largest_of_all({name: lamp(s) for name, s in scores.items()} if ranking == "lamp" else scores, ratio)
    if pattern == _ANYWHERE:
        return masks
    return {name: spread(mask, weights[name].shape, pattern) for name, mask in masks.items()}


def largest_of_all(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Return masks that keep the `(1 - ratio)` share of largest scores over all tensors together."""
    keep = largest(torch.cat([score.flatten() for score in scores.values()]), ratio)
    masks: dict[str, Tensor] = {}
    start = 0
    for name, score in scores.items():
        masks[name] = keep[start : start + score.numel()].reshape(score.shape)
        start += score.numel()
    return masks


def largest(scores: Tensor, ratio: float) -> Tensor:
    """Keep the `(1 - ratio)` share of largest scores, at least one; ties by position, so that every run agrees."""
    flat = scores.flatten()
    kept = max(1, round(flat.numel() * (1 - ratio)))
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > threshold
    tied = torch.nonzero(flat == threshold).flatten()
    mask[tied[: kept - int(mask.sum())]] = True
    return mask.reshape(scores.shape)
