"""Movement pruning: keep the weights that training moves away from zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.matrices import cubic, fresh_masks, matrices
from featherweight.techniques.scores import largest, largest_of_all
from featherweight.techniques.train import Training, fit

_START = 0.1  # share of training before which nothing is pruned, since the first scores are noise
_END = 0.7  # share of training at which the final ratio is reached; the rest heals at that ratio


@final
@dataclass(frozen=True)
class PruneMovement(Technique):
    """Train, and zero the share `ratio` of the weights with the least score `S = -sum(w dL/dw)` by the cubic schedule.

    A weight that is out keeps its value aside and goes on being scored by the gradient where it would be, so it may come
    back until the final ratio is reached. Weights are compared within each tensor, or over all (`ranking`).

    Paper: Sanh, Wolf & Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020 (hard, with scores).
    Use when: a pretrained model is fine-tuned to a task and most of its weights must go.
    Costs: `epochs` of training, and two more copies of the weights meanwhile.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    ratio: float = setting(0.9, low=0.0, high=0.9999)
    ranking: str = setting("layer", choices=("layer", "global"))
    epochs: int = setting(10, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Train in place, and yield one Write that names every pruned tensor as sparse."""
        weights = matrices(model, context)
        if not weights:
            return
        masks = fresh_masks(weights, context)
        allowed = {name: mask.clone() for name, mask in masks.items()}
        scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        aside = {name: weight.detach().clone() for name, weight in weights.items()}

        def schedule(before: float, done: float) -> bool:
            with torch.no_grad():
                for name, weight in weights.items():
                    aside[name].copy_(torch.where(masks[name], weight, aside[name]))
                due = cubic(before, done, _START, _END)
                if due is not None:
                    for name, mask in self._masks(scores, self.ratio * due).items():
                        masks[name].copy_(mask & allowed[name])
                        weights[name].copy_(aside[name])  # what came back; what is out is zeroed by the masks next
            return done >= _END

        def after_backward(parameters: dict[str, nn.Parameter]) -> None:
            for name, score in scores.items():
                gradient = parameters[name].grad if name in parameters else None
                if gradient is not None:
                    score -= gradient * aside[name]

        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        memory = {f"{kind}/{name}": t for kind, table in (("s", scores), ("w", aside)) for name, t in table.items()}
        fit(model, context, training, schedule, masks, after_backward, memory)
        yield Write(None, tuple(sorted(weights)))

    def _masks(self, scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
        if self.ranking == "global":
            return largest_of_all(scores, ratio)
        return {name: largest(score, ratio) for name, score in scores.items()}
