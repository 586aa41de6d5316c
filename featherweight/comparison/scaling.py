"""One strength for a whole recipe: stronger or milder than written, how long it heals, what it weighs untrained."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from featherweight.artifact import compact, package
from featherweight.data import Data
from featherweight.edits import Edit, Keep, Swap, Write, to_json
from featherweight.errors import RecipeError
from featherweight.portable import Graph, export_graph
from featherweight.running import run
from featherweight.scoping import Only
from featherweight.technique import Context, Recipe, Technique
from featherweight.techniques import Distill, PenalizeEntropy, PruneMovement, PruneWeights, QuantizeWeights

_OCTAVE = 16  # strengths tried between one and its double
_MILDEST, _STRONGEST = -6 * _OCTAVE, 5 * _OCTAVE
MARGIN = 0.98  # of the budget that the untrained file may take, because healing changes how well it codes


def scaled(technique: Technique, strength: float) -> Technique:
    """Return the technique stronger or milder than it is written, which is at 1.

    The share of what is kept is taken to the power of the strength, for a `ratio` of what goes and for an `energy` of what
    stays; a `step` or `rate` is multiplied by it; one of `bits` goes with each doubling. Everything else stays.

    Args:
        technique: a step, one narrowed by `only`, or a recipe.
        strength: above 0.
    """
    if isinstance(technique, Recipe):
        return dataclasses.replace(technique, parts=tuple(scaled(part, strength) for part in technique.parts))
    if isinstance(technique, Only):
        return dataclasses.replace(technique, inner=scaled(technique.inner, strength))
    changed: dict[str, Any] = {}
    unused = {"ratio" if getattr(technique, "rank", "") == "energy" else "energy"}
    if ":" in getattr(technique, "pattern", ""):
        unused.add("ratio")  # which the pattern says
    for field in dataclasses.fields(technique):
        if field.name in unused or field.name not in _KNOBS:
            continue
        value = _KNOBS[field.name](getattr(technique, field.name), strength)
        changed[field.name] = min(max(value, field.metadata["low"]), field.metadata["high"])
    return dataclasses.replace(technique, **changed)


_KNOBS: dict[str, Callable[[Any, float], Any]] = {
    "ratio": lambda value, strength: round(1 - (1 - value) ** strength, 4),
    "energy": lambda value, strength: round(value**strength, 4),
    "step": lambda value, strength: round(value * strength, 4),
    "rate": lambda value, strength: round(value * strength, 4),
    "bits": lambda value, strength: value - round(math.log2(strength)),
}


def has_strength(technique: Technique) -> bool:
    """Return whether a strength changes anything in it."""
    return scaled(technique, 2.0) != technique or scaled(technique, 0.5) != technique


def with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """Return the recipe with its training epochs shared out so that all its steps together take exactly `epochs`.

    The steps that train keep their proportion; a recipe without any ends with `distill`.

    Args:
        recipe: any.
        epochs: passes over the training data in all.

    Raises:
        RecipeError: there are more training steps than epochs.
    """
    given = [step.epochs for step in map(_bare, recipe.steps) if _trains(step)]
    if not given:
        return dataclasses.replace(recipe, parts=(*recipe.parts, Distill(epochs=epochs)))
    if len(given) > epochs:
        raise RecipeError(f"{recipe} trains in {len(given)} steps and may take {epochs} epochs: give each at least one")
    spare, shares = epochs - len(given), [(value / sum(given)) for value in given]
    counts = [1 + math.floor(spare * share) for share in shares]
    rest = sorted(range(len(given)), key=lambda place: spare * shares[place] % 1, reverse=True)
    for place in rest[: epochs - sum(counts)]:
        counts[place] += 1
    remaining = iter(counts)
    return Recipe(tuple(_mapped(step, lambda s: _retimed(s, remaining)) for step in recipe.steps), recipe.any_order)


def with_rate(recipe: Recipe, factor: float) -> Recipe:
    """Return the recipe with every learning rate of its training steps times `factor`, at most 1."""

    def changed(step: Technique) -> Technique:
        rate = getattr(step, "learning_rate", None)
        if not _trains(step) or rate is None:
            return step
        return dataclasses.replace(step, **{"learning_rate": min(1.0, rate * factor)})

    return Recipe(tuple(_mapped(step, changed) for step in recipe.steps), recipe.any_order)


def untrained(recipe: Recipe) -> Recipe:
    """Return the recipe without its training, for what its file weighs: what trains into a form is put there at once."""
    steps: list[Technique] = []
    for step in recipe.steps:
        bare = _bare(step)
        if not _trains(bare):
            steps.append(step)
        elif bare.stage is not None:
            steps.append(_mapped(step, _at_once))
    return Recipe(tuple(steps), recipe.any_order)


def _at_once(step: Any) -> Technique:
    if isinstance(step, PruneMovement):
        return PruneWeights(ratio=step.ratio, ranking=step.ranking)
    if isinstance(step, PenalizeEntropy):
        return QuantizeWeights(bits=step.bits, per_channel=step.per_channel)
    (epochs,) = (field for field in dataclasses.fields(step) if field.name == "epochs")
    least: Technique = dataclasses.replace(step, epochs=epochs.metadata["low"])
    return least


def _trains(step: Any) -> bool:
    return getattr(step, "epochs", 0) > 0


def _retimed(step: Any, remaining: Any) -> Any:
    return dataclasses.replace(step, epochs=next(remaining)) if _trains(step) else step


def _bare(step: Any) -> Any:
    while isinstance(step, Only):
        step = step.inner
    return step


def _mapped(step: Any, change: Callable[[Any], Technique]) -> Technique:
    """Return the step with the one inside every `only` around it changed."""
    if isinstance(step, Only):
        return dataclasses.replace(step, inner=_mapped(step.inner, change))
    return change(step)


class Scale:
    """Weighs recipes on one model, and finds the mildest strength whose untrained file is small enough."""

    def __init__(self, model: nn.Module, data: Data, seed: int) -> None:
        self.model, self.data, self.seed = model, data, seed
        self.memory: dict[Any, Any] = {}
        self._graphs: dict[str, Graph] = {}
        self._lengths: dict[str, int] = {}
        self._weighed: dict[str, int] = {}

    def weigh(self, recipe: Recipe) -> int:
        """Return the bytes of the file that the untrained recipe gives."""
        key = str(recipe)
        if key not in self._weighed:
            context = Context(data=self.data, teacher=self.model, seed=self.seed, memory=self.memory)
            model, edits = run(untrained(recipe), self.model, context)
            facts = {"recipe": recipe.to_json(), "seed": self.seed}
            bare = len(package(model, edits, facts, None).to_bytes())
            self._weighed[key] = bare + self._length(model, edits)
        return self._weighed[key]

    def strength(self, recipe: Recipe, allowed: float) -> float | None:
        """Return the mildest strength whose untrained file takes at most `MARGIN` of the bytes allowed.

        Args:
            recipe: as written.
            allowed: bytes.

        Returns:
            the strength, or None when not even the strongest is small enough.
        """

        def fits(step: int) -> bool:
            return self.weigh(_at(recipe, step)) <= MARGIN * allowed

        low, high = _MILDEST, _STRONGEST
        if fits(low):
            return _strength(low)
        if not fits(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return _strength(high)

    def graph(self, model: nn.Module, edits: list[Edit]) -> Graph:
        """Return the exported graph, which holds no weights: the same for models of the same structure."""
        key = json.dumps(to_json([edit for edit in compact(edits) if not isinstance(edit, Write)]))
        if key not in self._graphs:
            self._graphs[key] = export_graph(model, self.data)
        return self._graphs[key]

    def _length(self, model: nn.Module, edits: list[Edit]) -> int:
        """Bytes of the graph and of its list of weights: the same, near enough, for layers of the same kinds."""
        key = json.dumps(
            {
                "swaps": sorted({(edit.path, edit.kind) for edit in edits if isinstance(edit, Swap)}),
                "cut": any(isinstance(edit, Keep) for edit in edits),
            }
        )
        if key not in self._lengths:
            artifact = package(model, edits, {}, self.graph(model, edits))
            self._lengths[key] = len(artifact.to_bytes()) - len(artifact.to_bytes(graph=False))
        return self._lengths[key]


def _strength(step: int) -> float:
    return float(2 ** (step / _OCTAVE))


def _at(recipe: Recipe, step: int) -> Recipe:
    made = scaled(recipe, _strength(step))
    return made if isinstance(made, Recipe) else Recipe((made,))
