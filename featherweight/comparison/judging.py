"""What a model answers on the test data, and what that says beside the original's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Data, batches, example_inputs, forward, rebuild, select_output
from featherweight.modes import evaluating
from featherweight.scoring import Score, evaluate_outputs
from featherweight.significance import binary, bootstrap, calibration_error, damage_by_class, mcnemar


@dataclass(frozen=True)
class Answers:
    """One model on one split.

    Attributes:
        score: with one value a sample.
        top: the class chosen for each sample, `[n]`, or None where the outputs are no logits of classes.
        confidence: its probability, `[n]`, or None.
        labels: `[n]`, or None.
    """

    score: Score
    top: Tensor | None
    confidence: Tensor | None
    labels: Tensor | None


def answers(call: Callable[[Any], Sequence[Any]], model: nn.Module, data: Data, split: str = "test") -> Answers:
    """Return the answers of something that gives a flat list of arrays, such as `Artifact.run`.

    Args:
        call: inputs of one batch -> every tensor of the output, in order.
        model: whose output has the structure that loss and score expect; run once on the example.
        data: complete.
        split: whose loader is read once.
    """
    with evaluating(model):
        template = forward(model, example_inputs(data))
    read = list(batches(getattr(data, split), split))  # once, because a loader may shuffle
    held: dict[str, Any] = {split: read}
    seen: list[Tensor] = []

    def told(inputs: Any) -> Any:
        output = rebuild(template, [torch.as_tensor(value) for value in call(inputs)])
        seen.append(_selected(output, data).detach().float().cpu())
        return output

    score = evaluate_outputs(told, replace(data, **held), split)
    targets = [target for _, target in read]
    if not _are_classes(seen[0], targets[0], score):
        return Answers(score, None, None, None)
    confidence, top = torch.cat(seen).softmax(1).max(1)
    return Answers(score, top, confidence, torch.cat(targets).cpu())


def _selected(output: Any, data: Data) -> Tensor:
    if data.output is None and not isinstance(output, Tensor):
        return torch.zeros(1)  # the score's own business
    return select_output(output, data.output)


def _are_classes(output: Tensor, target: Any, score: Score) -> bool:
    if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point():
        return False
    return output.dim() == 2 and output.shape[1] > 1 and score.name == "accuracy"


def beside(before: Answers, after: Answers) -> dict[str, Any]:
    """Return what the compressed model's answers say beside the original's, JSON-able.

    Returns:
        `score`, `score_before`, `drop` with `drop_error` (one standard error) and `drop_interval` (95 %, bootstrap), `p_value`
        with `test` (McNemar's where answers are right or wrong, else that of a mean being zero), and for classes
        `agreement` (share with the same top class), `calibration_error` and `calibration_error_before`, `classes`
        (damage by class, in units of the score).
    """
    sign = 1 if before.score.higher_is_better else -1
    first, last = before.score.samples.double() * sign, after.score.samples.double() * sign
    found: dict[str, Any] = {
        "score": after.score.value,
        "score_before": before.score.value,
        "score_name": after.score.name,
        "higher_is_better": after.score.higher_is_better,
        "drop": before.score.drop(after.score),
        "drop_error": before.score.drop_error(after.score),
        "drop_interval": list(bootstrap(first - last)),
        "samples": len(first),
    }
    if binary(before.score.samples) and binary(after.score.samples):
        found |= {"test": "McNemar", "p_value": mcnemar(before.score.samples, after.score.samples)}
    else:
        found |= {"test": "paired z", "p_value": _p_of_mean(first - last)}
    if before.top is None or after.top is None or after.confidence is None or before.confidence is None:
        return found
    labels = before.labels if before.labels is not None else before.top
    return found | {
        "agreement": float((before.top == after.top).double().mean()),
        "calibration_error": calibration_error(after.confidence, (after.top == labels).float()),
        "calibration_error_before": calibration_error(before.confidence, (before.top == labels).float()),
        "classes": damage_by_class(before.score.samples, after.score.samples, labels),
    }


def _p_of_mean(differences: Tensor) -> float:
    """Return a two-sided p-value of the mean being zero, by the normal law of the mean: samples are many."""
    error = float(differences.std() / len(differences) ** 0.5) if len(differences) > 1 else 0.0
    if error == 0.0:
        return 1.0
    return float(torch.special.erfc(torch.tensor(abs(float(differences.mean())) / error / 2**0.5)))
