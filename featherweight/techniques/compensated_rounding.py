"""Integer codes of a weight that keep its outputs, not its values: what rounding costs, and what happened upstream, is made good.

Papers: Frantar et al., "GPTQ", ICLR 2023; inputs that are quantized themselves: Li et al., "GPTAQ", ICML 2025; descent over
single codes: Behdin et al., "QuantEase", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.layers import QuantizedLayer
from featherweight.layers.quantized import round_mantissa, significant_bits, span
from featherweight.techniques.compensation import BLOCK, compensate
from featherweight.techniques.moments import inverse_factor
from featherweight.techniques.paired import Pair
from featherweight.techniques.rounding import grid_scale

DAMPING = 0.01  # of the mean second moment
_CAUTION = 0.5  # the same, for a weight that is found from no more samples than it has columns
_FAITHFUL = 8  # bits at which weights are rounded towards themselves
_SWEEPS = 3
_TINY = 1e-12


@dataclass(frozen=True)
class Fitted:
    """What a quantized layer computes with.

    Attributes:
        codes: whole numbers shaped like the weight.
        scale: shaped as the kind's.
        bias: `[out]`, or None for a layer without.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def fitted(layer: nn.Module, fresh: QuantizedLayer, pair: Pair, sparse: bool) -> Fitted:
    """Return codes, scales and bias whose outputs in the changed model are nearest to the layer's in the original.

    At few bits the weight that does so without rounding is found first, by least squares; at `_FAITHFUL` bits and more there is little
    to make good, and shrinking what is noisy would cost signal. Then columns are rounded in the order of their
    inputs' energy, each one's error moved to those behind; then single codes are changed as long as that helps, and scales
    refitted in between. The bias takes what is left of the mean.

    Args:
        layer: a linear layer or a convolution.
        fresh: its quantized kind, without values.
        pair: moments of its inputs.
        sparse: whether its zeros must stay.
    """
    weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
    rows = rows_of(weight, pair)
    held = (rows == 0) & sparse
    second, cross = damped(pair, isinstance(bias, Tensor))
    target = least_squares(rows, second, cross, pair.samples) if fresh.bits < _FAITHFUL else rows
    target = target.masked_fill(held, 0.0)
    worth = second.diagonal(dim1=1, dim2=2)[:, None].expand_as(target)
    scale = grid_scale(
        fresh.rows(target.reshape(weight.shape)), fresh.bits, True, fresh.full, fresh.rows(worth.reshape(weight.shape))
    ).reshape(fresh.scale.shape)
    goal = Goal(target, second, held, *span(fresh.bits, fresh.full))
    steps = _steps(fresh, scale, goal)
    codes = goal.rounded(steps)
    for _ in range(_SWEEPS):
        if scale.numel() in (1, len(weight)):
            scale = round_mantissa(goal.refitted(codes, scale), significant_bits(fresh.bits))
            steps = _steps(fresh, scale, goal)
        codes = goal.descended(codes, steps)
    moved = moved_bias(bias, rows, codes * steps, pair) if isinstance(bias, Tensor) else None
    return Fitted(codes.reshape(weight.shape), scale, moved)


def rows_of(weight: Tensor, pair: Pair) -> Tensor:
    """Return a weight as `[groups, out, in]` float64, where its inputs' moments are."""
    groups, columns = pair.mean.shape
    return weight.detach().to(pair.second).reshape(groups, -1, columns)


def damped(pair: Pair, biased: bool) -> tuple[Tensor, Tensor]:
    """Return the second and cross moments, `[groups, in, in]`, with what little is known of them made good for.

    Args:
        pair: moments of the inputs.
        biased: whether a bias takes what is left of the mean, so that moments are about the means.
    """
    columns = pair.mean.shape[1]
    second, cross = pair.centred() if biased else (pair.second, pair.cross)
    unsure = max(1.0, columns / pair.samples)  # fewer samples than columns say little of most directions
    damping = unsure * DAMPING * second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_TINY)
    ridge = torch.diag_embed(damping[:, None].expand_as(pair.mean))
    return second + ridge, cross + ridge


def least_squares(rows: Tensor, second: Tensor, cross: Tensor, samples: int) -> Tensor:
    """Return the weight whose outputs for the changed inputs come nearest to the old ones, `[groups, out, in]`.

    It is held near the weight as it was: what is fitted closely to few samples is wrong on all others.

    Args:
        rows: the weight as it was, `[groups, out, in]`.
        second: from `damped`, as is `cross`.
        cross: `[groups, in, in]`.
        samples: that the moments come from.
    """
    columns = second.shape[1]
    damping = _CAUTION * min(1.0, columns / samples) * second.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.diag_embed(damping[:, None].expand(-1, columns))
    found: Tensor = torch.linalg.solve(second + ridge, rows @ (cross + ridge), left=False)
    return found


def moved_bias(bias: Tensor, rows: Tensor, values: Tensor, pair: Pair) -> Tensor:
    """Return the bias that keeps the mean of the outputs, `[out]`.

    Args:
        bias: as it was.
        rows: the weight as it was, `[groups, out, in]`.
        values: as it is now, the same.
        pair: moments of the inputs.
    """
    kept = rows @ pair.mean[..., None] - values @ pair.changed[..., None]
    return bias.detach() + kept.flatten().to(bias)


def _steps(fresh: QuantizedLayer, scale: Tensor, goal: Goal) -> Tensor:
    """The step of each weight, broadcastable to `[groups, out, in]`."""
    steps, (groups, out, _) = fresh.steps(scale).double(), goal.target.shape
    if steps.numel() == 1:
        return steps.reshape(1, 1, 1)
    return steps.reshape(groups, out, 1 if steps.numel() == groups * out else -1)


@dataclass(frozen=True)
class Goal:
    """Codes `q` of least `sum (w - q s) H (w - q s)^T`, over rows `w`.

    Attributes:
        target: `w`, `[groups, out, in]` float64.
        second: `H`, second moment of the inputs, damped, `[groups, in, in]`.
        held: weights whose code is zero, boolean as `target`.
        low: smallest code.
        high: largest code.
    """

    target: Tensor
    second: Tensor
    held: Tensor
    low: int
    high: int

    def rounded(self, steps: Tensor) -> Tensor:
        """Return codes by the optimal brain surgeon, `[groups, out, in]`; inputs of most energy come first."""
        order = self.second.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
        columns = order[:, None].expand_as(self.target)
        matrix, held = self.target.gather(2, columns), self.held.gather(2, columns)
        steps = steps.expand_as(self.target).gather(2, columns)
        second = self.second.gather(1, order[..., None].expand_as(self.second))
        factor = inverse_factor(second.gather(2, order[:, None].expand_as(second)), 0.0)

        def settle(column: int, values: Tensor) -> Tensor:
            step = steps[..., column]
            nearest = (values / step).round().clamp(self.low, self.high) * step
            return nearest.masked_fill(held[..., column], 0.0)

        compensate(matrix, factor, settle)
        return torch.empty_like(matrix).scatter_(2, columns, (matrix / steps).round())

    def descended(self, codes: Tensor, steps: Tensor) -> Tensor:
        """Return codes of which each in turn took its best value given the others; the cost never grows."""
        codes, steps = codes.clone(), steps.expand_as(codes)
        slope = (self.target - codes * steps) @ self.second
        energy = self.second.diagonal(dim1=1, dim2=2)
        for start in range(0, codes.shape[2], BLOCK):
            end = min(codes.shape[2], start + BLOCK)
            inner, near = self.second[:, start:end, start:end], slope[..., start:end].clone()
            moved = torch.zeros_like(near)
            for column in range(start, end):
                step, old = steps[..., column], codes[..., column]
                wanted = old + near[..., column - start] / energy[:, None, column] / step
                new = wanted.round().clamp(self.low, self.high).masked_fill(self.held[..., column], 0.0)
                moved[..., column - start] = (new - old) * step
                near -= moved[..., column - start, None] * inner[:, None, column - start]
                codes[..., column] = new
            slope -= moved @ self.second[:, start:end]
        return codes

    def refitted(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the scale, `[out]` or `[1]`, of least cost for these codes; the old one where it would not be positive."""
        towards = codes @ self.second
        above, below = (towards * self.target).sum(2).flatten(), (towards * codes).sum(2).flatten()
        if scale.numel() == 1:
            above, below = above.sum()[None], below.sum()[None]
        fits = (above > 0) & (below > 0)
        return torch.where(fits, above / below.where(fits, 1.0), scale.double().to(above)).to(scale)

    def cost(self, codes: Tensor, steps: Tensor) -> float:
        """Return the cost of codes."""
        lost = self.target - codes * steps
        return float(((lost @ self.second) * lost).sum())
