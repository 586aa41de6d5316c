"""Choose the step of a symmetric grid, and round weights to it."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.layers.quantized import round_mantissa, significant_bits, span

_STRIDE, _COARSE = 0.01, 5
_SHARES = torch.linspace(0.25, 1.0, 76, dtype=torch.float64).tolist()  # of the largest magnitude, _STRIDE apart
_FINE = 6  # bits up to which each share is tried
_CACHED = 1 << 15  # weights searched at a time: every try reads them anew, which is quick from a cache only


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
    together = max(1, _CACHED // max(1, rows.shape[1]))
    best = torch.cat(
        [
            _best_steps(
                rows[some : some + together],
                bits,
                span(bits, full),
                None if costs is None else costs[some : some + together],
            )
            for some in range(0, len(rows), together)
        ]
    )
    return round_mantissa(best.flatten().float().clamp_min(1e-8), significant_bits(bits))


def _best_steps(rows: Tensor, bits: int, limits: tuple[int, int], costs: Tensor | None) -> Tensor:
    """The step of each row, `[rows, 1]` float64."""
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-8)
    if bits == 1:
        return rows.abs().mean(1, keepdim=True)
    whole = largest / limits[1]
    shares = torch.tensor(_SHARES[:: 1 if bits <= _FINE else _COARSE], dtype=rows.dtype, device=rows.device)
    best = _best_share(rows, whole, shares.expand(len(rows), -1), limits, costs)
    if bits > _FINE:  # whose error changes smoothly: a coarse search and one around its result find the same
        around = torch.arange(1 - _COARSE, _COARSE, device=rows.device) * _STRIDE
        best = _best_share(rows, whole, (best + around).clamp(max=1.0), limits, costs)
    return whole * best


def _best_share(rows: Tensor, whole: Tensor, shares: Tensor, limits: tuple[int, int], costs: Tensor | None) -> Tensor:
    """The share of a step, `[rows, 1]`, with the least squared error, of ascending ones `[rows, shares]`; the smallest of several.

    It is searched from above, until what is clipped already costs each row more than its best.
    """
    magnitudes, room = rows.abs(), torch.empty_like(rows)
    best, least = torch.ones_like(whole), torch.full_like(whole, torch.inf)
    for place in reversed(range(shares.shape[1])):
        share = shares[:, place, None]
        step = whole * share
        torch.sub(magnitudes, step * -limits[0], out=room).clamp_(min=0).square_()
        if bool(((room if costs is None else room.mul_(costs)).sum(1, keepdim=True) > least).all()):
            break
        torch.div(rows, step, out=room).round_().clamp_(*limits).mul_(step).sub_(rows).square_()
        error = (room if costs is None else room.mul_(costs)).sum(1, keepdim=True)
        best, least = torch.where(error <= least, share, best), torch.minimum(error, least)
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
