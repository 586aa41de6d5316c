"""Cross-layer equalization: channels with large weights before an activation and small ones behind it meet in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write, module_at
from featherweight.errors import ModelError
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.links import divided, links, multiplied, reach

_CLOSE = 1e-3  # change of every factor at which iterating ends


@final
@dataclass(frozen=True)
class EqualizeLayers(Technique):
    """Scale the channels between two layers so that their weights have the same range on both sides; the function stays.

    A channel's rows are divided by `s = sqrt(r1 r2) / r2` and the columns behind multiplied, `r1` and `r2` being the largest
    magnitudes of the two, over all pairs of layers with nothing between them but ReLU, leaky ReLU, pooling and dropout.

    Paper: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
    Use when: one scale a tensor, or depthwise convolutions, at few bits; after `fold_batch_norm`. With a scale a channel it
        brings little.
    Costs: nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    rounds: int = setting(20, low=1, high=1000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write of all scaled weights."""
        try:
            found = links(model, context)
        except ModelError as error:
            context.leave("", str(error))
            return
        pairs = [
            (link.producer, link.consumers[0])
            for link in found
            if link.producer is not None
            and len(link.consumers) == 1
            and not isinstance(module_at(model, link.producer), nn.LayerNorm)
        ]
        if not pairs:
            context.leave("", "no two layers have nothing but ReLU, pooling and dropout between them")
            return
        state = {
            f"{path}.{name}".lstrip("."): value.detach().double()
            for pair in pairs
            for path in pair
            for name, value in module_at(model, path).named_parameters()
        }
        for _ in range(self.rounds):
            moved = [_equalized(state, *pair) for pair in pairs]
            if max(moved) < _CLOSE:
                break
        kept = {name: value.to(model.get_parameter(name)) for name, value in state.items()}
        if all(bool(torch.isfinite(value).all()) for value in kept.values()):
            yield Write(kept)
        else:
            context.leave("", "equalized weights are not finite")

    def mildest(self) -> Technique:
        """Return itself: the function stays."""
        return self


def _equalized(state: dict[str, Tensor], producer: str, consumer: str) -> float:
    """Equalize one pair in place, and return by how much a factor differs from one at most."""
    names = [f"{producer}.weight".lstrip("."), f"{producer}.bias".lstrip("."), f"{consumer}.weight".lstrip(".")]
    before, bias, behind = state[names[0]], state.get(names[1]), state[names[2]]
    first, second = before.abs().flatten(1).amax(1), reach(behind, len(before))
    usable = (first > 0) & (second > 0)
    factors = torch.where(usable, (first * second).sqrt() / second.where(usable, 1.0), 1.0)
    state[names[0]], scaled = divided(before, bias, factors)
    if scaled is not None:
        state[names[1]] = scaled
    state[names[2]] = multiplied(behind, factors)
    return float((factors - 1).abs().max())
