"""What an error in each weight costs, as far as the square of the error says: a diagonal of second derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches
from featherweight.technique import Context
from featherweight.techniques.gradients import gradients
from featherweight.techniques.imitation import output_kind
from featherweight.techniques.importance import digest

_FLOOR = 0.05  # of a tensor's mean: what calibration data never met may still be met


def curvatures(
    model: nn.Module, weights: Mapping[str, nn.Parameter], context: Context, count: int
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher matrix, `[out, rest]` for each weight, float64 on the CPU, up to one factor for all.

    It is that of what the model itself predicts (the Gauss-Newton matrix), so no labels are read; squares of gradients along
    random directions of the output estimate it, one direction a sample, which is exact in the mean. As in KFAC (Martens &
    Grosse, 2015) a weight's value is taken for the product of its row's and its column's mean, which averages the noise out.
    Where `Data.step` is the loss, squares of its gradients take the place.

    Args:
        model: comes back as it was.
        weights: parameters of the model by name; one without a part in the output has no entry.
        context: gives calibration data, loss, seed and device; its memory keeps the result.
        count: calibration batches to read.

    Raises:
        DataError: there is no calibration data.
    """
    known = ("curvatures", tuple(weights), count, context.draw("probes"), digest(model))
    if known not in context.memory:
        data = context.data
        if data.step is None:
            some = [(inputs, torch.zeros(())) for inputs, _ in islice(batches(data.calibrate, "calibrate"), count)]
            data = dataclasses.replace(data, calibrate=some, loss=_probe(context))
        squares = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
        met: set[str] = set()
        for found in gradients(model, weights, dataclasses.replace(context, data=data), count):
            for name, gradient in found.items():
                squares[name] += gradient.detach().cpu().double().square()
            met |= found.keys()
        context.memory[known] = {name: _factored(squares[name].flatten(1)) for name in weights if name in met}
    kept: dict[str, Tensor] = context.memory[known]
    return kept


def _probe(context: Context) -> Any:
    """Return a loss whose gradient with respect to the output has the loss's second derivatives as its covariance."""
    kind, draw = output_kind(context.data.loss), context.rng("probes")

    def probe(output: Tensor, _: Tensor) -> Tensor:
        wanted = output.detach()
        noise = torch.randn(wanted.shape, generator=draw).to(wanted)
        if kind == "classes" and wanted.dim() > 1:
            chances = F.softmax(wanted, 1)
            noise = noise * chances.sqrt()
            noise = noise - chances * noise.sum(1, keepdim=True)  # its covariance is diag(p) - p p^T
        elif kind == "labels":
            chances = torch.sigmoid(wanted)
            noise = noise * (chances * (1 - chances)).sqrt()
        return (noise * output).sum()

    return probe


def _factored(squares: Tensor) -> Tensor:
    """Return means of rows times means of columns over the mean, and a floor, `[out, rest]`."""
    mean = squares.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return squares.mean(1, keepdim=True) * squares.mean(0, keepdim=True) / mean + _FLOOR * mean
