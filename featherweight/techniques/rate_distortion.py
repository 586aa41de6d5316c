"""Integer codes of a matrix at the least sum of error and bits, with the error moved to later columns or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.coding.choice import Chooser

_BLOCK = 128  # columns after which compensation reaches the columns behind
_DEAD_ZONE = 0.15  # about by how much bits widen what becomes zero; for the first guess of magnitudes alone
HIGHEST = 127


@dataclass(frozen=True)
class Rounding:
    """What decides the codes of one weight.

    Attributes:
        weight: `[out, rest]`, float64.
        worth: what the square of an error costs at each weight, `[out, rest]` float64, in units in which `rate` is a bit.
        held: weights that must stay zero, boolean `[out, rest]`.
        side: columns of the kernel; 1 where there is none.
        rate: what a bit costs.
        moment: second moment of the inputs, damped, `[groups, in, in]` float64, where errors are to be compensated.
        factor: upper Cholesky factor of the inverse of the moment, then.
        gain: what the square of an error of each row's output costs then, `[out, 1]`; by it the step is refitted.
    """

    weight: Tensor
    worth: Tensor
    held: Tensor
    side: int
    rate: float
    moment: Tensor | None = None
    factor: Tensor | None = None
    gain: Tensor | None = None


def codes_of(made: Rounding, step: Tensor) -> Tensor:
    """Return the codes, `[out, rest]` float64, whole numbers of magnitude at most 127.

    Without compensation every weight minimises `worth (w - q step)^2 + rate bits(q)`. With it the worth is the row's mean, shared
    in proportion to `1 / U_jj^2` over the columns `j`, `U` being the upper Cholesky factor of the inverse moment: what is left of an
    error then. So a bit may cost the same share of it with and without. The error goes to the later columns (GPTQ).

    Args:
        made: what decides.
        step: distance of the codes, `[out, 1]` or `[1, 1]`.
    """
    values, worth = made.weight / step, made.worth * step.square()
    mean = max(float((values.abs() - _DEAD_ZONE).clamp(0, HIGHEST).round().mean()), 2.0**-10)
    chooser = Chooser(mean, len(values), made.side, made.rate, HIGHEST)
    if made.factor is None:
        codes, _ = chooser.block(values.numpy(), worth.masked_fill(made.held, -1.0).numpy())
        return torch.from_numpy(codes).double()
    factor, left = made.factor, uncompensated(made.factor)[:, None]
    groups, width = factor.shape[:2]
    rest = values.reshape(groups, -1, width).clone()
    costs = worth.mean(1).reshape(groups, -1, 1) * left / left.mean(2, keepdim=True)
    costs = costs.masked_fill(made.held.reshape(costs.shape), -1.0)
    found = []
    for start in range(0, width, _BLOCK):
        end = min(width, start + _BLOCK)
        block, inner = rest[..., start:end].flatten(0, 1), factor[:, start:end, start:end]
        codes, errors = chooser.block(block.numpy(), costs[..., start:end].flatten(0, 1).numpy(), inner.numpy())
        rest[..., end:] -= torch.from_numpy(errors).reshape(groups, -1, end - start) @ factor[:, start:end, end:]
        found.append(torch.from_numpy(codes))
    return torch.cat(found, 1).double()


def uncompensated(factor: Tensor) -> Tensor:
    """Return what is left of the energy of a unit error at each input once later inputs make good for it, `[groups, in]`.

    Args:
        factor: upper Cholesky factors of the inverse second moments of the inputs, `[groups, in, in]`.
    """
    return factor.diagonal(dim1=1, dim2=2).square().reciprocal()


def refitted_step(made: Rounding, codes: Tensor, step: Tensor) -> Tensor:
    """Return the step, shaped as it is, at which these codes lie nearest to the weight by what errors cost.

    Args:
        made: what decides.
        codes: `[out, rest]`, whole numbers.
        step: the step they were chosen at, `[out, 1]` or `[1, 1]`; kept where all codes are zero.
    """
    if made.moment is None or made.gain is None:
        towards = made.worth * codes
    else:
        grouped = codes.reshape(len(made.moment), -1, codes.shape[1]) @ made.moment.cpu()
        towards = made.gain * grouped.flatten(0, 1)
    above, below = (towards * made.weight).sum(1, keepdim=True), (towards * codes).sum(1, keepdim=True)
    if len(step) == 1:
        above, below = above.sum(0, keepdim=True), below.sum(0, keepdim=True)
    fits = (below > 0) & (above > 0)
    return torch.where(fits, above / torch.where(fits, below, 1.0), step)
