"""Choose the range of a grid of up to 8 bits for activations: how much of what passed is worth covering."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.techniques.observe import Observed

METHODS = ("mse", "minmax", "average", "percentile", "entropy")
_SHARES, _LEAST = (
    60,
    0.3,
)  # candidates of the search by squared error, and the smallest; a third of it for 4 bits and below
_REACHES, _MOVES = (0.1, 0.02, 0.004), 8  # how far an end is moved then, as a share of it, and in how many steps
_PERCENTILE = 0.9999
_BINS = 2048
_MIDDLE, _WIDER = 128, 17 / 16  # of 256 codes, and what steps may grow by so that zero is there
_TINY = 1e-12

Grid = tuple[Tensor, Tensor]
"""`(scale [] float32, zero [] uint8)`."""


def unsigned_grid(observed: Observed, method: str, bits: int = 8) -> Grid:
    """Return the grid of `2 ** bits` codes that holds zero exactly, for one way of choosing its range.

    Args:
        observed: what passed.
        method: `"minmax"` covers everything; `"average"` the moving average of what a batch needs; `"percentile"` all but one
            value in 10,000 on either side; `"mse"` clips where that lowers the squared error on the sample; `"entropy"` where the
            clipped and rounded values keep most of the distribution (Migacz, "8-bit Inference with TensorRT", 2017).
        bits: width of the codes, 1 to 8.
    """
    low, high = min(0.0, observed.low), max(0.0, observed.high)
    if high - low < _TINY:
        return torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    return _grid(*_RANGES[method](observed, low, high, 2**bits - 1), 2**bits - 1)


def centred(grid: Grid) -> Grid:
    """Return a grid of 256 codes with its zero at 128, if its steps grow by a sixteenth at most; else the grid itself.

    As signed codes such a grid has its zero at 0, and an integer kernel has nothing to make good for.
    """
    scale, zero = grid
    wider = max(int(zero) / _MIDDLE, (255 - int(zero)) / (255 - _MIDDLE))
    return (scale * wider, torch.full_like(zero, _MIDDLE)) if wider <= _WIDER else grid


def on_grid(values: Tensor, grid: Grid, most: int = 255) -> Tensor:
    """Return the values, any shape, as a grid of the codes 0 to `most` holds them."""
    scale, zero = grid[0].to(values), grid[1].to(values)
    return ((values / scale + zero).round().clamp(0, most) - zero) * scale


def _grid(low: float, high: float, most: int) -> Grid:
    scale = torch.tensor((high - low) / most, dtype=torch.float32)
    zero = torch.tensor(min(most, max(0, round(-low / float(scale)))), dtype=torch.uint8)
    return scale, zero


def _whole(observed: Observed, low: float, high: float, most: int) -> tuple[float, float]:
    return low, high


def _average(observed: Observed, low: float, high: float, most: int) -> tuple[float, float]:
    if observed.average_low is None or observed.average_high is None:
        return low, high
    low, high = min(0.0, observed.average_low), max(0.0, observed.average_high)
    return low, max(high, low + _TINY)


def _percentile(observed: Observed, low: float, high: float, most: int) -> tuple[float, float]:
    values = observed.sample.double().sort().values
    last = len(values) - 1
    cut = round((1 - _PERCENTILE) * last)
    low, high = min(0.0, float(values[cut])), max(0.0, float(values[last - cut]))
    return low, max(high, low + _TINY)


def _squared_error(observed: Observed, low: float, high: float, most: int) -> tuple[float, float]:
    """Both ends are shrunk together first, and then moved one by one: by little, so that values that come often lie on codes."""

    def cost(ends: tuple[float, float]) -> float:
        gap = on_grid(observed.sample, _grid(*ends, most), most) - observed.sample
        return float(gap.double().square().mean())

    shares = torch.linspace(1.0, _LEAST if most > 15 else _LEAST / 3, _SHARES).tolist()
    best = min(((low * share, high * share) for share in shares), key=cost)
    for reach in _REACHES:
        factors = (1 + reach * torch.linspace(-1, 1, _MOVES)).tolist()
        best = min((best, *((best[0] * factor, best[1]) for factor in factors)), key=cost)
        best = min((best, *((best[0], best[1] * factor) for factor in factors)), key=cost)
    return best


def _entropy(observed: Observed, low: float, high: float, most: int) -> tuple[float, float]:
    magnitudes = observed.sample.double().abs()
    largest = max(-low, high)
    levels = most if low == 0.0 or high == 0.0 else (most + 1) // 2
    counts = torch.histc(magnitudes, _BINS, 0.0, largest)
    kept = min(range(levels, _BINS + 1, 8), key=lambda bins: divergence(counts, bins, levels))
    edge = largest * min(1.0, (kept + 0.5) / _BINS)
    return max(low, -edge), min(high, edge)


def divergence(counts: Tensor, kept: int, levels: int) -> float:
    """Return what of a distribution's shape is lost, in nats, when bins from `kept` on are clipped and the rest merged.

    Args:
        counts: of magnitudes in equal bins from zero, `[bins]`.
        kept: bins that are not clipped, `levels` to `bins`.
        levels: codes for them.

    Returns:
        The Kullback-Leibler divergence of the clipped distribution from the merged one, which is spread over non-empty bins.
    """
    inside = counts[:kept]
    clipped = inside.clone()
    clipped[-1] += counts[kept:].sum()
    level = torch.arange(kept) * levels // kept
    filled = (inside > 0).double()
    total = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside.double())
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    merged = (total / bins.clamp_min(1.0))[level] * filled
    wanted, given = clipped / clipped.sum().clamp_min(_TINY), merged / merged.sum().clamp_min(_TINY)
    there = wanted > 0
    return float((wanted[there] * (wanted[there] / given[there].clamp_min(_TINY)).log()).sum())


_RANGES: dict[str, Callable[[Observed, float, float, int], tuple[float, float]]] = {
    "minmax": _whole,
    "average": _average,
    "percentile": _percentile,
    "mse": _squared_error,
    "entropy": _entropy,
}
