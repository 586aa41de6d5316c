"""Choose the step of a symmetric grid, and round weights to it."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.layers.quantized import round_mantissa, significant_bits, span

_CANDIDATES = torch.linspace(0.25, 1.0, 76, dtype=torch.float64)


def grid_scale(weight: Tensor, bits: int, per_channel: bool, full: bool = False, worth: Tensor | None = None) -> Tensor:
    """Return the step with the least squared rounding error, `[out]` or `[1]`, among shares of the largest magnitude.

    Zeros cost nothing on a grid that holds zero, so a pruned tensor gets the step its survivors want. For signs it is the mean
    magnitude (Rastegari et al., XNOR-Net, ECCV 2016).

    Args:
        weight: `[out, ...]`.
        bits: width of the codes, 1 to 8.
        per_channel: one step for each slice of dimension 0, or one in all.
        full: whether the grid has one more code below zero; see `layers.quantized.span`.
        worth: what the square of an error costs at each weight, shaped like it; the same everywhere when None.
    """
    rows = weight.detach().double().reshape(weight.shape[0] if per_channel else 1, -1)
    costs = torch.ones_like(rows) if worth is None else worth.double().reshape(rows.shape)
    low, high = span(bits, full)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-8)
    best, best_error = largest / high, torch.full_like(largest, torch.inf)
    if bits == 1:
        best = rows.abs().mean(1, keepdim=True)
    for share in _CANDIDATES.tolist() if bits > 1 else ():
        step = largest * share / high
        error = ((rows / step).round().clamp(low, high) * step - rows).square().mul_(costs).sum(1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, step, best), torch.where(better, error, best_error)
    return round_mantissa(best.flatten().float().clamp_min(1e-8), significant_bits(bits))


def to_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the int8 codes of a weight on a grid.

    Args:
        weight: `[out, ...]`.
        scale: `[out]`, `[1]`, or with as many dimensions as the weight, to which it broadcasts then.
        bits: width of the codes, 2 to 8.
    """
    step = scale if scale.dim() == weight.dim() else scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / step).round().clamp(*span(bits)).to(torch.int8)
