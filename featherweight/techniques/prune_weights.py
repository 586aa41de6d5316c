"""Unstructured pruning: set the least important weights to zero, at once or gradually while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.scores import masks_at
from featherweight.techniques.train import Training, fit

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.Embedding,
    nn.MultiheadAttention,
)
_RAMP = 0.6  # share of training over which the ratio rises; the rest heals at the final ratio
_INTERVAL = 0.01  # share of the rise after which the weights are ranked anew


@final
@dataclass(frozen=True)
class PruneWeights(Technique):
    """Zero a share `ratio` of the weights by magnitude; with `epochs`, gradually, by the cubic schedule, while training.

    Every zero stays zero through any later training. Biases and norms are never pruned.

    Paper: Zhu & Gupta, "To prune, or not to prune", 2017: `s_t = s (1 - (1 - t/n)^3)`; ranking `lamp`: Lee et al., 2021.
    Use when: bytes on disk matter; zeros are almost free in the file, but no runtime here computes faster for them.
    Costs: `epochs` of training, or one sort.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    ratio: float = setting(0.9, low=0.0, high=0.9999)
    ranking: str = setting("lamp", choices=("lamp", "global", "layer"))
    epochs: int = setting(0, low=0, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Training data when pruning gradually."""
        return frozenset({"train", "validate"}) if self.epochs else frozenset()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write that names every pruned tensor as sparse."""
        weights = dict(_weights(model, context))
        if not weights:
            return
        masks = masks_at(weights, self.ratio, self.ranking)
        if not self.epochs:
            state = {name: weights[name].detach().masked_fill(~mask, 0.0) for name, mask in masks.items()}
            yield Write(state, tuple(sorted(state)))
            return
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

        def schedule(before: float, done: float) -> bool:
            ramp = min(1.0, done / _RAMP)
            if int(before / _RAMP / _INTERVAL) != int(done / _RAMP / _INTERVAL) and before < _RAMP:
                current = masks_at(weights, self.ratio * (1 - (1 - ramp) ** 3), self.ranking)
                for name, mask in current.items():
                    masks[name].copy_(mask)
            return ramp >= 1.0

        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        fit(model, context, training, schedule, masks)
        yield Write(None, tuple(sorted(weights)))

    def mildest(self) -> Technique:
        """Return pruning that removes nothing."""
        return PruneWeights(ratio=0.0, ranking=self.ranking)


def _weights(model: nn.Module, context: Context) -> list[tuple[str, Tensor]]:
    """Every matrix-like parameter of the layers in scope, once, by its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for _, layer in context.targets(model, *_LAYERS):
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.dim() >= 2:
                found[first[id(parameter)]] = parameter
    return list(found.items())
