"""Unstructured pruning: set the least important weights to zero, at once or gradually while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from featherweight.edits import Write
from featherweight.errors import RecipeError
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.matrices import cubic, fresh_masks, matrices
from featherweight.techniques.own_values import matched, read_own
from featherweight.techniques.patterns import Blocks, KeepOf, Pattern, parse_pattern
from featherweight.techniques.scores import largest, masks_at
from featherweight.techniques.train import Training, fit

_RAMP = 0.6  # share of training over which the ratio rises; the rest heals at the final ratio


@final
@dataclass(frozen=True)
class PruneWeights(Technique):
    """Zero a share `ratio` of the weights by magnitude; with `epochs`, gradually, by the cubic schedule, while training.

    Every zero stays zero through any later training. Biases and norms are never pruned. `pattern` says where zeros may
    stand: `""` anywhere, `"2:4"` so that 2 of each 4 consecutive inputs stay (then `ratio` must be 0.5), `"4x1"` in whole
    blocks of 4 outputs and 1 input. `ratios` gives tensors ratios of their own by name, such as `"0.weight 0.5, layer1.* 0.9"`;
    each is ranked within, and those that no pattern matches are left dense.

    Paper: Zhu & Gupta, "To prune, or not to prune", 2017: `s_t = s (1 - (1 - t/n)^3)`; ranking `lamp`: Lee et al., 2021;
        ranking `erk`: Evci et al., 2020.
    Use when: bytes on disk matter; zeros are almost free in the file, but no runtime here computes faster for them.
    Costs: `epochs` of training, or one sort.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    ratio: float = setting(0.9, low=0.0, high=0.9999)
    ranking: str = setting("lamp", choices=("lamp", "global", "layer", "erk"))
    pattern: str = setting("")
    ratios: str = setting("")
    epochs: int = setting(0, low=0, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._pattern() != Blocks() and self.ratios:
            raise RecipeError("prune_weights: ratios of single tensors go without a pattern")
        self._own()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Training data when pruning gradually."""
        return frozenset({"train", "validate"}) if self.epochs else frozenset()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield one Write that names every pruned tensor as sparse."""
        weights = matrices(model, context)
        own = matched(self._own(), weights, "weight")
        weights = {name: weight for name, weight in weights.items() if name in own} if self.ratios else weights
        if not weights:
            return
        pattern = self._pattern()
        ratio = pattern.ratio if isinstance(pattern, KeepOf) else self.ratio

        def chosen_at(share: float) -> dict[str, Tensor]:
            if self.ratios:
                return {name: largest(weight.detach().abs(), share * own[name]) for name, weight in weights.items()}
            return masks_at(weights, share * ratio, self.ranking, pattern)

        if not self.epochs:
            chosen = chosen_at(1.0)
            state = {name: weights[name].detach().masked_fill(~mask, 0.0) for name, mask in chosen.items()}
            yield Write(state, tuple(sorted(state)))
            return
        masks = fresh_masks(weights, context)

        def schedule(before: float, done: float) -> bool:
            due = cubic(before, done, 0.0, _RAMP)
            if due is not None:
                for name, mask in chosen_at(due).items():
                    masks[name].logical_and_(mask)
            return done >= _RAMP

        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        fit(model, context, training, schedule, masks)
        yield Write(None, tuple(sorted(weights)))

    def mildest(self) -> Technique:
        """Return pruning that removes nothing."""
        return PruneWeights(ratio=0.0, ranking=self.ranking)

    def _pattern(self) -> Pattern:
        return parse_pattern(self.pattern, self.ratio, "prune_weights")

    def _own(self) -> dict[str, float]:
        """Ratios by pattern of a tensor's name."""
        wanted = "name and ratio from 0 to 0.9999, such as 'layer1.*.weight 0.9', in prune_weights' ratios"
        return read_own(self.ratios, lambda ratio: 0 <= ratio <= 0.9999, wanted)
