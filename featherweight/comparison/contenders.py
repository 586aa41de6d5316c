"""Who competes: baselines that are always there, techniques alone, combinations, recipes from files, and the joint search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featherweight.comparison.scaling import has_strength
from featherweight.errors import RecipeError, closest
from featherweight.recipe_files import load_recipe
from featherweight.technique import Recipe, Technique
from featherweight.techniques import (
    Distill,
    FactorRecurrent,
    FoldBatchNorm,
    LowRank,
    PenalizeEntropy,
    PruneChannels,
    PruneWeights,
    QuantizeRateDistortion,
    QuantizeWeights,
    ReestimateNorms,
    Reinitialize,
)


@dataclass(frozen=True)
class Contender:
    """One way to make a model small.

    Attributes:
        name: in tables, file names and on the command line.
        kind: `"baseline"`, `"technique"`, `"combination"`, `"file"` or `"search"`.
        about: in a few words.
        recipe: its steps at strength 1, or None for the joint search that `compress` makes.
    """

    name: str
    kind: str
    about: str
    recipe: Recipe | None

    @property
    def scales(self) -> bool:
        """Whether a budget changes what it does."""
        return self.recipe is None or has_strength(self.recipe)


def _of(name: str, kind: str, about: str, *steps: Technique) -> Contender:
    return Contender(name, kind, about, Recipe(steps))


_RANKS = {"rank": "spread", "method": "whitened", "ratio": 0.5}
_RECURRENT = {**_RANKS, "hidden": "factors"}  # bytes are what is limited
BASELINES = (
    _of("dense", "baseline", "the original, healed as long as the rest", Distill()),
    _of(
        "scratch",
        "baseline",
        "a small dense network trained from scratch",
        PruneChannels(ratio=0.5),
        Reinitialize(),
        Distill(),
    ),
    _of("random", "baseline", "channels removed at random", PruneChannels(ratio=0.5, importance="random"), Distill()),
    _of("magnitude", "baseline", "weights zeroed by magnitude, at once", PruneWeights(ranking="global"), Distill()),
)
CONTENDERS = (
    _of(
        "channels",
        "technique",
        "channels removed by the loss they cost",
        PruneChannels(ratio=0.5, importance="taylor", ranking="global"),
        Distill(),
    ),
    _of("low_rank", "technique", "layers factored", LowRank(**_RANKS), FactorRecurrent(**_RECURRENT), Distill()),  # type: ignore[arg-type]
    _of("sparse", "technique", "weights zeroed gradually", PruneWeights(ratio=0.9, epochs=2), Distill(epochs=1)),
    _of("bits", "technique", "integer weights, trained as such", FoldBatchNorm(), QuantizeWeights(bits=4), Distill()),
    _of(
        "rate_distortion",
        "technique",
        "integer weights at the least sum of error and bits",
        FoldBatchNorm(),
        Distill(),
        QuantizeRateDistortion(),
    ),
    _of(
        "channels_bits",
        "combination",
        "channels removed, integer weights",
        FoldBatchNorm(),
        PruneChannels(ratio=0.3, importance="taylor", ranking="global"),
        Distill(),
        QuantizeWeights(bits=5),
        Distill(learning_rate=5e-4),
    ),
    _of(
        "low_rank_bits",
        "combination",
        "layers factored, integer weights",
        FoldBatchNorm(),
        LowRank(**{**_RANKS, "ratio": 0.3}),  # type: ignore[arg-type]
        FactorRecurrent(**{**_RECURRENT, "ratio": 0.3}),  # type: ignore[arg-type]
        Distill(),
        QuantizeWeights(bits=5),
        Distill(learning_rate=5e-4),
    ),
    _of(
        "sparse_bits",
        "combination",
        "weights zeroed gradually, integer weights",
        FoldBatchNorm(),
        PruneWeights(ratio=0.8, epochs=2, learning_rate=2e-3),
        QuantizeWeights(bits=4, per_channel=False),
        Distill(epochs=1, learning_rate=5e-4),
    ),
    _of(
        "channels_sparse_bits",
        "combination",
        "channels removed, weights zeroed, integer weights",
        FoldBatchNorm(),
        PruneChannels(ratio=0.2, importance="taylor", ranking="global"),
        Distill(epochs=1),
        PruneWeights(ratio=0.6, epochs=2, learning_rate=2e-3),
        QuantizeWeights(bits=4, per_channel=False),
        Distill(epochs=1, learning_rate=5e-4),
    ),
    _of(
        "slim",
        "combination",
        "channels removed, layers factored",
        PruneChannels(ratio=0.3, importance="taylor", ranking="global"),
        LowRank(**{**_RANKS, "ratio": 0.3}),  # type: ignore[arg-type]
        FactorRecurrent(**{**_RECURRENT, "ratio": 0.3}),  # type: ignore[arg-type]
        Distill(),
    ),
    _of(
        "sparse_rate_distortion",
        "combination",
        "weights zeroed gradually, then the least sum of error and bits",
        FoldBatchNorm(),
        PruneWeights(ratio=0.7, epochs=2, learning_rate=2e-3),
        Distill(epochs=1, learning_rate=5e-4),
        QuantizeRateDistortion(),
        ReestimateNorms(),
    ),
    _of(
        "sparse_entropy",
        "combination",
        "weights zeroed gradually, then trained on their own bits",
        FoldBatchNorm(),
        PruneWeights(ratio=0.7, epochs=1, learning_rate=2e-3),
        PenalizeEntropy(epochs=1, bits=4),
    ),
    Contender("joint", "search", "what compress does with the same budget", None),
)


def chosen(recipes: str | Sequence[str]) -> list[Contender]:
    """Return the contenders asked for, the baselines always first.

    Args:
        recipes: `"all"`, names of contenders and paths of recipe files, as a list or separated by commas.

    Raises:
        RecipeError: a name is unknown, a file cannot be read, or two have the same name.
    """
    asked = [part.strip() for part in recipes.split(",")] if isinstance(recipes, str) else list(recipes)
    known = {contender.name: contender for contender in (*BASELINES, *CONTENDERS)}
    found = list(BASELINES)
    for name in asked:
        if name == "all":
            added = [*CONTENDERS]
        elif name in known:
            added = [known[name]]
        elif name.endswith((".yaml", ".yml", ".json")):
            added = [Contender(Path(name).stem, "file", f"the recipe of {name}", load_recipe(name))]
        else:
            raise RecipeError(f"recipe {name!r} is unknown.{closest(name, ['all', *known])} Or a file: {name}.yaml")
        for contender in added:
            if contender.kind == "file" and any(contender.name == other.name for other in (*known.values(), *found)):
                raise RecipeError(f"{name}: a recipe named {contender.name!r} is there already; rename the file")
            if contender not in found:
                found.append(contender)
    return found
