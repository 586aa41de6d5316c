"""`only`: a technique narrowed to the layers whose paths match, in place of an `ignore=` in every technique."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from featherweight.errors import RecipeError, closest
from featherweight.technique import Context, Edits, Recipe, Stage, Technique


@final
@dataclass(frozen=True)
class Only(Technique):
    """A step narrowed to the layers whose paths match; made by `only`."""

    patterns: tuple[str, ...]
    inner: Technique

    @property
    def stage(self) -> Stage | None:  # type: ignore[override]
        """The stage of the step inside."""
        return self.inner.stage

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the step inside needs."""
        return self.inner.needs

    @property
    def steps(self) -> tuple[Technique, ...]:
        """The elementary steps inside, each narrowed alike."""
        return (
            tuple(Only(self.patterns, step) for step in self.inner.steps) if isinstance(self.inner, Recipe) else (self,)
        )

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield the inner step's edits on the narrowed scope.

        Raises:
            RecipeError: a pattern matches no path of the model.
        """
        paths = [path for path, _ in model.named_modules() if path]
        for pattern in self.patterns:
            bare = pattern.removeprefix("!")
            if not any(fnmatch.fnmatchcase(path, bare) for path in paths):
                raise RecipeError(
                    f"only({pattern!r}) matches no layer of {type(model).__name__}.{closest(bare, paths)}"
                )
        narrowed = dataclasses.replace(context, scope=(*context.scope, self.patterns))
        yield from self.inner.edits(model, narrowed)

    def to_json(self) -> Any:
        """Return `{"only": {"patterns": [...], "step": ...}}`."""
        return {"only": {"patterns": list(self.patterns), "step": self.inner.to_json()}}

    def __str__(self) -> str:
        return f"only({', '.join(self.patterns)}: {self.inner})"


def only(patterns: str | tuple[str, ...] | list[str], technique: Technique) -> Only:
    """Narrow a technique to the layers whose dotted paths match.

    Args:
        patterns: `fnmatch` patterns, comma-separated or as a sequence; a leading `!` excludes; children are included.
        technique: the step, or a whole recipe, to narrow.

    Example:
        >>> only("features.*, !features.0", PruneWeights(ratio=0.9))
    """
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    cleaned = tuple(part.strip() for part in parts if part.strip())
    if not cleaned:
        raise RecipeError(f"only({patterns!r}) has no pattern: name a path such as 'layer3.*' or '!classifier'")
    return Only(cleaned, technique)
