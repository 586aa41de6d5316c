"""How much each weight, or each channel of a coupled group, matters."""

from __future__ import annotations

import torch
from torch import Tensor


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


def masks_at(weights: dict[str, Tensor], ratio: float, ranking: str) -> dict[str, Tensor]:
    """Return a boolean mask for each weight that removes a share `ratio` of all of them, the least important first.

    Args:
        weights: by name, any shapes.
        ratio: share removed, 0 to 1.
        ranking: `"layer"` compares magnitudes within each tensor, `"global"` over all, `"lamp"` their LAMP scores over all.
    """
    if ranking == "layer":
        return {name: _largest(weight.detach().abs().double(), ratio) for name, weight in weights.items()}
    scores = {
        name: lamp(weight) if ranking == "lamp" else weight.detach().abs().double() for name, weight in weights.items()
    }
    together = torch.cat([score.flatten() for score in scores.values()])
    keep = _largest(together, ratio)
    masks: dict[str, Tensor] = {}
    start = 0
    for name, score in scores.items():
        masks[name] = keep[start : start + score.numel()].reshape(score.shape)
        start += score.numel()
    return masks


def _largest(scores: Tensor, ratio: float) -> Tensor:
    """Keep the `(1 - ratio)` share of largest scores, at least one; ties by position, so that every run agrees."""
    flat = scores.flatten()
    kept = max(1, round(flat.numel() * (1 - ratio)))
    threshold = flat.kthvalue(flat.numel() - kept + 1).values
    mask = flat > threshold
    tied = torch.nonzero(flat == threshold).flatten()
    mask[tied[: kept - int(mask.sum())]] = True
    return mask.reshape(scores.shape)
