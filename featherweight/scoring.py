"""Losses and scores by name, and `evaluate`: how good a model is on one loader, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Data, batches, describe, forward, select_output
from featherweight.errors import DataError, closest
from featherweight.modes import evaluating


@dataclass(frozen=True)
class Lower:
    """A score of which less is better; made by `lower`."""

    function: Callable[[Any, Any], Any]


def lower(function: Callable[[Any, Any], Any]) -> Lower:
    """Mark a score callable as one of which less is better, such as an error or a perplexity."""
    return Lower(function)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Whether the largest logit is the target: 1 or 0 a sample, `[batch]` (classes on dimension 1)."""
    hit = (output.argmax(1) == target).float()
    return hit.flatten(1).mean(1) if hit.dim() > 1 else hit


def binary_accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of a sample's labels of yes (1) or no (0) on whose side its logits are, `[batch]`."""
    return _per_sample(((output > 0) == (target.reshape(output.shape) > 0.5)).float())


def _per_sample(error: Tensor) -> Tensor:
    return error.flatten(1).mean(1) if error.dim() > 1 else error


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, `[batch]`."""
    return _per_sample((output - target.to(output.dtype).reshape(output.shape)) ** 2)


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each sample, `[batch]`."""
    return _per_sample((output - target.to(output.dtype).reshape(output.shape)).abs())


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point() and target.numel() and output.dim() > 1:
        low, high, classes = int(target.min()), int(target.max()), output.shape[1]
        if high >= classes or (low < 0 and low != -100):
            wrong = high if high >= classes else low
            raise DataError(
                f"label {wrong} is out of range: the model's output {describe(output)} has classes 0 to {classes - 1}"
            )
    return F.cross_entropy(output, target)


def _binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    if target.numel() and not 0 <= float(target.min()) <= float(target.max()) <= 1:
        wrong = float(target.min()) if target.min() < 0 else float(target.max())
        raise DataError(f"label {wrong:g} is out of range: binary_cross_entropy takes 0 for no to 1 for yes")
    return F.binary_cross_entropy_with_logits(output, target.to(output.dtype).reshape(output.shape))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": lambda output, target: squared_error(output, target).mean(),
    "l1": lambda output, target: absolute_error(output, target).mean(),
}
SCORES: dict[str, Any] = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "mse": lower(squared_error),
    "mae": lower(absolute_error),
}


def loss_function(data: Data) -> Callable[[Any, Any], Tensor]:
    """Return the loss as a function of the model's whole output and the target.

    Raises:
        DataError: `data.loss` is an unknown name, or the output needs `Data(output=...)`.
    """
    chosen = data.loss
    if isinstance(chosen, str):
        if chosen not in LOSSES:
            raise DataError(f"Data(loss={chosen!r}) is not known.{closest(chosen, LOSSES)} Or give a callable.")
        named = LOSSES[chosen]
        return lambda output, target: named(select_output(output, data.output), target)
    if data.output is None:
        return chosen
    return lambda output, target: chosen(select_output(output, data.output), target)


@dataclass(frozen=True)
class Score:
    """A score on one loader.

    Attributes:
        value: the mean over the samples.
        higher_is_better: the direction.
        samples: one value a sample, `[n]`, or one a batch where the score gives no more.
        name: how the score is called in reports.
    """

    value: float
    higher_is_better: bool
    samples: Tensor
    name: str

    @property
    def error(self) -> float:
        """One standard error of `value`; infinite when there are fewer than two values."""
        n = len(self.samples)
        return float(self.samples.double().std() / math.sqrt(n)) if n > 1 else math.inf

    def drop(self, after: Score) -> float:
        """By how much `after` is worse, in units of the score; negative when it is better."""
        return self.value - after.value if self.higher_is_better else after.value - self.value

    def drop_error(self, after: Score) -> float:
        """One standard error of `drop`, paired over the samples where both have them.

        Where a sample is right or wrong, half a change for the better and half a one for the worse are added: few changes among few
        samples say less than their variance does (Agresti & Min, Statistics in Medicine 2005).
        """
        count = len(self.samples)
        if count == len(after.samples) and count > 1:
            before, now = self.samples.double(), after.samples.double()
            more = 1.0 if bool(((before == 0) | (before == 1)).all() & ((now == 0) | (now == 1)).all()) else 0.0
            return math.sqrt((float((before - now).var() * (count - 1)) + more) / (count - 1) / count)
        return math.hypot(self.error, after.error)


def score_function(data: Data) -> tuple[Callable[[Any, Any], Any], bool, str]:
    """Return the score as a function of the whole output and the target, its direction and its name.

    Raises:
        DataError: `data.score` is an unknown name.
    """
    chosen = data.score
    name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", "score")
    if isinstance(chosen, str):
        if chosen not in SCORES:
            raise DataError(f"Data(score={chosen!r}) is not known.{closest(chosen, SCORES)} Or give a callable.")
        chosen = SCORES[chosen]
    higher = not isinstance(chosen, Lower)
    function = chosen.function if isinstance(chosen, Lower) else chosen
    if isinstance(data.score, str) or data.output is not None:
        return (lambda output, target: function(select_output(output, data.output), target)), higher, name
    return function, higher, name


def evaluate_outputs(call: Callable[[Any], Any], data: Data, split: str, device: torch.device | str = "cpu") -> Score:
    """Return the score of anything callable on inputs over one split of the data.

    Args:
        call: inputs of one batch -> output, like the model's.
        data: where the loader and the score come from.
        split: `"train"`, `"calibrate"`, `"validate"` or `"test"`.
        device: where the inputs are put.

    Raises:
        DataError: the loader is empty, has NaN, has no labels, or the score gives NaN.
    """
    function, higher, name = score_function(data)
    values: list[Tensor] = []
    whole_batches = False
    sizes: list[int] = []
    for index, (inputs, target) in enumerate(batches(getattr(data, split), split, device)):
        if target is None:
            raise DataError(f"Data.{split}: batch {index} has no target, and a score needs one: yield (inputs, target)")
        value = torch.as_tensor(function(call(inputs), target), dtype=torch.float64).detach().cpu()
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"the score is {value.flatten()[0].item()} on batch {index} of Data.{split}: the model's output or the target is not finite"
            )
        whole_batches |= value.dim() == 0
        values.append(value.reshape(-1))
        sizes.append(_batch_size(target, inputs))
    samples = torch.cat(values)
    weights = (
        torch.tensor(sizes, dtype=torch.float64) if whole_batches else torch.ones(len(samples), dtype=torch.float64)
    )
    return Score(float((samples * weights).sum() / weights.sum()), higher, samples, name)


def evaluate(model: nn.Module, data: Data, split: str, device: torch.device | str = "cpu") -> Score:
    """Return the model's score on one split, in evaluation mode; its mode is put back.

    Raises:
        DataError: as `evaluate_outputs`.
    """
    with evaluating(model):
        return evaluate_outputs(lambda inputs: forward(model, inputs), data, split, device)


def _batch_size(target: Any, inputs: Any) -> int:
    for value in (target, inputs):
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return 1
