"""Search spaces: functions that draw a recipe from an Optuna trial; conditions are plain ifs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from featherweight.data import Data
from featherweight.errors import FeatherweightError
from featherweight.running import run
from featherweight.technique import Context, Recipe, Technique, name_of
from featherweight.techniques import (
    Distill,
    FactorRecurrent,
    FoldBatchNorm,
    LowRank,
    PenalizeEntropy,
    PruneBlocks,
    PruneChannels,
    PruneWeights,
    QuantizeRateDistortion,
    QuantizeStatic,
    QuantizeWeights,
    ReestimateNorms,
    SeparateConvolutions,
)

if TYPE_CHECKING:
    import optuna

Space = Callable[["optuna.Trial"], Recipe]
"""Draws a recipe. What it draws must depend on the trial alone."""

_PROBES: tuple[Technique, ...] = (
    FoldBatchNorm(),
    PruneBlocks(ratio=0.4),
    PruneChannels(ratio=0.3),
    SeparateConvolutions(),
    LowRank(ratio=0.3, rank="ratio"),
    FactorRecurrent(ratio=0.3, rank="ratio"),
    QuantizeStatic(),
    ReestimateNorms(batches=1),
)


def families(model: nn.Module, data: Data) -> frozenset[str]:
    """Return the names of the techniques that find something to do in a model, each tried once on a private copy.

    Args:
        model: it is not changed.
        data: complete; gives the example and calibration data.
    """
    found = set()
    for probe in _PROBES:
        try:
            if run(probe, model, Context(data=data)).edits:
                found.add(name_of(type(probe)))
        except FeatherweightError:
            continue  # a family that cannot work on this model is left out
    return frozenset(found)


@dataclass(frozen=True)
class DefaultSpace:
    """Orders and strengths of all families: students, cuts, factors, zeros, codes, and the heals between them.

    Every setting is drawn in every trial, used or not, because samplers learn from what all trials share.

    Attributes:
        families: names of those that apply, from `families`.
        epochs: of a whole heal; a trial trains 1 to 5 times as many.
        speed: whether the budget limits time, so that integer activations are offered.
    """

    families: Collection[str]
    epochs: int = 10
    speed: bool = False

    def __call__(self, trial: optuna.Trial) -> Recipe:
        """Draw one recipe."""
        blocks = trial.suggest_float("blocks", 0.0, 0.7)
        channels = trial.suggest_float("channels", 0.0, 0.8)
        importance = trial.suggest_categorical("importance", ("l2", "taylor"))
        separate = trial.suggest_categorical("separate", (False, True))
        rank = trial.suggest_float("rank", 0.0, 0.8)
        factor_first = trial.suggest_categorical("factor_first", (False, True))
        zeros = trial.suggest_float("zeros", 0.0, 2.0)  # powers of ten by which weights get fewer
        codes = trial.suggest_categorical("codes", ("weights", "rate_distortion", "entropy"))
        bits = trial.suggest_int("bits", 3, 8)
        rate = trial.suggest_float("rate", 0.02, 2.0, log=True)
        often = trial.suggest_categorical("heal_often", (False, True))
        learning_rate = trial.suggest_float("learning_rate", 1e-4, 6e-3, log=True)
        static = self.speed and trial.suggest_categorical("static", (False, True))

        heal = [Distill(epochs=self.epochs, learning_rate=learning_rate)]
        norms = [ReestimateNorms()] if "reestimate_norms" in self.families else []
        cuts: list[Technique] = []
        if blocks > 0.1 and "prune_blocks" in self.families:
            cuts.append(PruneBlocks(ratio=round(blocks, 3)))
        if channels > 0.05 and "prune_channels" in self.families:
            cuts.append(PruneChannels(ratio=round(channels, 3), importance=importance, ranking="group"))
        factors: list[Technique] = []
        if separate and "separate_convolutions" in self.families:
            factors.append(SeparateConvolutions())
        if rank > 0.05:
            if "low_rank" in self.families:
                factors.append(LowRank(ratio=round(rank, 3), rank="ratio", method="whitened"))
            if "factor_recurrent" in self.families:
                factors.append(FactorRecurrent(ratio=round(rank, 3), rank="ratio"))
        swapped = factor_first and bool(cuts) and bool(factors)
        steps: list[Technique] = [FoldBatchNorm()] if "fold_batch_norm" in self.families else []
        for part in (factors, cuts) if swapped else (cuts, factors):
            if part:
                steps += [*part, *(norms if not steps or part is cuts else [])]
                steps += heal if often else []
        if zeros > 0.1:
            steps.append(
                PruneWeights(ratio=round(1 - 10**-zeros, 4), epochs=2 * self.epochs, learning_rate=learning_rate)
            )
        last = Distill(epochs=self.epochs, learning_rate=learning_rate / 2)
        if static and "quantize_static" in self.families:
            steps += [QuantizeStatic(weight_bits=max(4, bits)), last]
        elif codes == "weights":
            steps += [QuantizeWeights(bits=bits, per_channel=bits > 4), last]
        elif codes == "rate_distortion":
            steps += [*heal, QuantizeRateDistortion(rate=round(rate, 4)), *norms]
        else:
            steps.append(
                PenalizeEntropy(epochs=2 * self.epochs, learning_rate=learning_rate, rate=round(rate, 4), bits=bits)
            )
        return Recipe(tuple(steps), any_order=swapped)
