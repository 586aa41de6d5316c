"""What a change of each weight matrix costs: by its values alone, by what enters it, or by what the loss makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from featherweight.edits import module_at
from featherweight.technique import Context
from featherweight.techniques.factorizations import Metric
from featherweight.techniques.gradients import gradients
from featherweight.techniques.moments import ROWS, first_names, moments

METHODS = ("svd", "whitened", "fisher")
FROM_DATA = frozenset({"whitened", "fisher"})
_EXACT = 1024  # columns; wider layers' covariances are good to six digits, in half the time
_LEAST = 1e-4  # of the mean importance; a row that the loss never saw still counts a little


def metrics(model: nn.Module, context: Context, paths: Sequence[str], method: str, batches: int) -> dict[str, Metric]:
    """Return the metric of each weight matrix of the layers at these paths, by the first name of its tensor.

    A matrix that calibration data never reached has none. Layers with groups are not meant.

    Args:
        model: comes back as it was.
        context: gives calibration data, seed and device.
        paths: dotted paths of layers of the types in `moments.LAYERS`.
        method: `"svd"`: every change counts alike. `"whitened"`: by the squared error of the outputs, once the bias has made
            good their mean (Wang et al., "SVD-LLM", ICLR 2025). `"fisher"`: by row and by column as much as the squares of
            the loss's gradients add up to there (Hsu et al., "Language model compression with weighted low-rank
            factorization", ICLR 2022, on both sides).
        batches: how many calibration batches to read.

    Raises:
        DataError: calibration data is needed and missing, or has NaN.
    """
    names = first_names(model)
    held = [
        (names[id(value)], value) for path in paths for value in module_at(model, path).parameters() if value.dim() > 1
    ]
    if not held or method == "svd":
        return {name: Metric() for name, _ in held}
    seen = moments(model, context, paths, batches, ROWS, _EXACT)
    found = {
        name: Metric(second[0] - torch.outer(first[0], first[0]), first[0]) for name, (first, second) in seen.items()
    }
    if method == "whitened":
        return found
    squares = _gradients(model, context, dict(held), batches)
    return {
        name: replace(found[name], rows=_felt(squares[name], seen[name][1][0])) for name in found if name in squares
    }


def _felt(squares: Tensor, second: Tensor) -> Tensor:
    """Root mean squares of the gradients at the outputs, `[out]`, from those at the weights, whose columns the inputs scale.

    They are the same in unit for all layers.
    """
    rows = squares.sum(1) / second.trace().clamp_min(1e-300)
    return (rows + _LEAST * rows.mean()).clamp_min(1e-300).sqrt()


def _gradients(model: nn.Module, context: Context, weights: dict[str, nn.Parameter], count: int) -> dict[str, Tensor]:
    """Sums over calibration batches of the squared gradients of the loss, `[out, in]` float64, by name."""
    sums: dict[str, Tensor] = {}
    for found in gradients(model, weights, context, count):
        for name, gradient in found.items():
            square = gradient.double().square().reshape(len(gradient), -1)
            sums[name] = sums[name] + square if name in sums else square
    return sums
