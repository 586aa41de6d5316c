"""Choose the step of a symmetric grid, and round weights to it."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.layers.quantized import round_mantissa, significant_bits, span

_STRIDE, _COARSE = 0.01, 5
_SHARES = torch.linspace(0.25, 1.0, 76, dtype=torch.float64).tolist()  # of the largest magnitude, _STRIDE apart
_FINE = 6  # bits up to which each share is tried


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
    costs = None if worth is None else worth.double().reshape(rows.shape)
    low, high = span(bits, full)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-8)
    if bits == 1:
        best = rows.abs().mean(1, keepdim=True)
    elif bits <= _FINE:
        best = largest / high * _best_share(rows, largest / high, torch.ones_like(largest), _SHARES, (low, high), costs)
    else:  # the error of a fine grid changes smoothly, so a coarse search and one around its result find the same
        near = _best_share(rows, largest / high, torch.ones_like(largest), _SHARES[::_COARSE], (low, high), costs)
        around = [place * _STRIDE for place in range(1 - _COARSE, _COARSE)]
        best = largest / high * _best_share(rows, largest / high, near, around, (low, high), costs, beside=True)
    return round_mantissa(best.flatten().float().clamp_min(1e-8), significant_bits(bits))


def _best_share(
    rows: Tensor,
    whole: Tensor,
    start: Tensor,
    shares: list[float],
    limits: tuple[int, int],
    costs: Tensor | None,
    beside: bool = False,
) -> Tensor:
    """The share of a step, `[rows, 1]`, with the least squared error: one of `shares`, or of those added to `start`."""
    best, least, room = start, torch.full_like(whole, torch.inf), torch.empty_like(rows)
    for share in shares:
        tried = (start + share).clamp(max=1.0) if beside else torch.full_like(whole, share)
        step = whole * tried
        torch.div(rows, step, out=room).round_().clamp_(*limits).mul_(step).sub_(rows).square_()
        error = (room if costs is None else room.mul_(costs)).sum(1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def to_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the int8 codes of a weight on a grid.

    Args:
        weight: `[out, ...]`.
        scale: `[out]`, `[1]`, or with as many dimensions as the weight, to which it broadcasts then.
        bits: width of the codes, 2 to 8.
    """
    step = scale if scale.dim() == weight.dim() else scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / step).round().clamp(*span(bits)).to(torch.int8)
