"""Watch what flows through layers on calibration data, and choose the range of an 8-bit grid for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from featherweight.data import batches, forward, tensors
from featherweight.edits import module_at
from featherweight.modes import evaluating
from featherweight.technique import Context

_KEPT = 65_536  # values of each tensor kept for choosing the range
_CANDIDATES = 60


@dataclass
class Observed:
    """Smallest and largest value that passed, and an even sample of the values, `[n]`."""

    low: float
    high: float
    sample: Tensor


def observe(
    model: nn.Module, context: Context, paths: Iterable[str], count: int
) -> tuple[dict[str, Observed], dict[str, Observed]]:
    """Run calibration batches and return what entered and what left each layer, by path.

    Args:
        model: run in evaluation mode as it is; its hooks are removed again, also on error.
        context: gives the loader and the device.
        paths: dotted paths of layers that take and return one tensor.
        count: batches to read.

    Raises:
        DataError: there is no calibration data, or it has NaN.
    """
    entered: dict[str, Observed] = {}
    left: dict[str, Observed] = {}
    handles = []

    def hook(path: str) -> None:
        def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            _update(entered, path, next(tensors((args, kwargs))))
            _update(left, path, output)

        handles.append(module_at(model, path).register_forward_hook(see, with_kwargs=True))

    try:
        for path in paths:
            hook(path)
        with evaluating(model):
            for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), count):
                forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return entered, left


def _update(seen: dict[str, Observed], path: str, value: Tensor) -> None:
    flat = value.detach().flatten().float().cpu()
    sample = flat[:: max(1, flat.numel() // (_KEPT // 8))]
    low, high = float(flat.min()), float(flat.max())
    if path in seen:
        before = seen[path]
        sample = torch.cat([before.sample, sample])
        if sample.numel() > _KEPT:
            sample = sample[::2]
        low, high = min(low, before.low), max(high, before.high)
    seen[path] = Observed(low, high, sample)


def unsigned_grid(observed: Observed, method: str, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return `(scale [], zero [])` of a grid of `2 ** bits` codes that holds zero exactly.

    Args:
        observed: what passed.
        method: `"minmax"` covers everything; `"mse"` clips where that lowers the squared error on the sample.
        bits: width of the codes, 1 to 8.
    """
    low, high = min(0.0, observed.low), max(0.0, observed.high)
    if high - low < 1e-12:
        return torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    shares = [1.0] if method == "minmax" else torch.linspace(1.0, 0.3 if bits > 4 else 0.1, _CANDIDATES).tolist()
    best = min((_error(observed.sample, low * share, high * share, bits), -share) for share in shares)
    share = -best[1]
    return _grid(low * share, high * share, bits)


def _grid(low: float, high: float, bits: int) -> tuple[Tensor, Tensor]:
    most = 2**bits - 1
    scale = torch.tensor((high - low) / most, dtype=torch.float32)
    zero = torch.tensor(min(most, max(0, round(-low / float(scale)))), dtype=torch.uint8)
    return scale, zero


def _error(sample: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero = _grid(low, high, bits)
    codes = (sample / scale + zero).round().clamp(0, 2**bits - 1)
    return float(((codes - zero.float()) * scale - sample).square().mean())
