"""`Technique`, settings that look at a model and yield edits; `Recipe`, techniques in order; `Context`, what they may know."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import nn

from featherweight.data import Data
from featherweight.edits import Edit
from featherweight.errors import RecipeError

Layer = TypeVar("Layer", bound=nn.Module)
Report = Callable[[str, float], None]
"""Takes a one-line message and the share of that work done, 0 to 1."""

Edits = Generator[Edit | tuple[Edit, ...], bool, None]
"""Edits that do not depend on each other may come as one tuple, which is checked in one go; True means that all of them stayed."""
MASKED_TOLERANCE = 1e-3


class Stage(enum.IntEnum):
    """Where a technique stands in a recipe; going back a stage is an error unless the recipe says `any_order`."""

    FOLD = 0
    CUT = 1
    FACTOR = 2
    SPARSIFY = 3
    QUANTIZE = 4
    CODE = 5


@dataclass
class Untouched:
    """A layer that a step left alone, and why."""

    path: str
    step: str
    reason: str


@dataclass
class Context:
    """What a technique may know while it works.

    Attributes:
        data: loaders, loss and score, complete.
        teacher: the original model in evaluation mode, or None.
        device: where the work is done.
        seed: the seed of every random draw.
        scope: patterns over dotted paths, outermost first; a path must pass each of them.
        sparse: names of tensors whose zeros training must keep.
        untouched: layers left alone, with the reason; techniques add to it.
        workspace: folder for checkpoints, or None for none.
        report: where one-line messages about progress go.
        step: number of the step in its recipe, part of every random draw.
        memory: what was expensive to compute, by everything it depends on; trials on the same weights may share it.
    """

    data: Data
    teacher: nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    scope: tuple[tuple[str, ...], ...] = ()
    sparse: set[str] = field(default_factory=set)
    untouched: list[Untouched] = field(default_factory=list)
    workspace: Path | None = None
    report: Report = field(default=lambda message, done: None)
    step: str = ""
    position: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)

    def draw(self, *parts: object) -> int:
        """Return an integer that depends on the seed, the step and `parts`, and on nothing else."""
        text = repr((self.seed, self.position, *parts)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")

    def rng(self, *parts: object) -> torch.Generator:
        """Return a generator seeded by `draw(*parts)`."""
        return torch.Generator().manual_seed(self.draw(*parts))

    def in_scope(self, path: str) -> bool:
        """Whether a dotted path is inside every scope around this step."""
        return all(matches(path, patterns) for patterns in self.scope)

    def targets(self, model: nn.Module, *types: type[Layer]) -> Iterator[tuple[str, Layer]]:
        """Yield `(path, module)` of every module in scope of exactly one of these types; subclasses have forwards of their own."""
        for path, module in model.named_modules():
            if type(module) in types and self.in_scope(path):
                yield path, module

    def leave(self, path: str, reason: str) -> None:
        """Record that a layer is left alone, and why."""
        self.untouched.append(Untouched(path, self.step, reason))


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path, or a parent of it, matches a pattern and none that starts with `!`."""
    parents = [path] + [path[: m.start()] for m in re.finditer(r"\.", path)]

    def hit(pattern: str) -> bool:
        return any(fnmatch.fnmatchcase(parent, pattern) for parent in parents)

    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    refused = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return (not wanted or any(map(hit, wanted))) and not any(map(hit, refused))


def setting(default: Any, *, low: float = -math.inf, high: float = math.inf, choices: tuple[Any, ...] = ()) -> Any:
    """Declare a field of a technique with its default and its range; written once, checked and documented from here."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Technique(ABC):
    """Settings that look at a model and yield edits. Subclasses are final frozen dataclasses of at most eight fields.

    Class attributes:
        stage: where it stands in a recipe, or None for training steps, which stand anywhere.
        needs: what it reads beside the model, a subset of `{"calibrate", "train"}`; checked before any work starts.
    """

    stage: ClassVar[Stage | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if "choices" in f.metadata:
                object.__setattr__(self, f.name, _checked(type(self), f, getattr(self, f.name)))

    @abstractmethod
    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield edits; `kept = yield edit` says whether it stayed, and it is applied before the next line runs."""

    def mildest(self) -> Technique | None:
        """Return the setting nearest the identity, for the conformance suite, or None when there is none."""
        return None

    @property
    def steps(self) -> tuple[Technique, ...]:
        """The elementary steps, in order."""
        return (self,)

    def to_json(self) -> Any:
        """Return the settings that differ from the defaults, `{"prune_weights": {"ratio": 0.9}}`, or the bare name."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return {name_of(type(self)): changed} if changed else name_of(type(self))

    def __str__(self) -> str:
        settings = ", ".join(
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        )
        return f"{name_of(type(self))}({settings})"

    def __add__(self, other: Technique) -> Recipe:
        return Recipe((*self.steps, *other.steps))


def name_of(technique: type[Technique]) -> str:
    """Return the name of a technique in recipes and on the command line: `PruneWeights` is `prune_weights`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", technique.__name__).lower()


def _checked(owner: type[Technique], f: dataclasses.Field[Any], value: Any) -> Any:
    where = f"{name_of(owner)}: {f.name}={value!r}"
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    if choices:
        if value not in choices:
            raise RecipeError(f"{where} is not one of {', '.join(map(repr, choices))}")
        return value
    if isinstance(f.default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"{where} must be true or false")
    elif isinstance(f.default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecipeError(f"{where} must be a whole number from {low} to {high}")
    elif isinstance(f.default, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"{where} must be a number from {low} to {high}")
        value = float(value)
    if isinstance(value, int | float) and not low <= value <= high:
        raise RecipeError(f"{where} is out of range: it must be from {low} to {high}")
    return value


@final
@dataclass(frozen=True)
class Recipe(Technique):
    """Steps in order; a recipe is itself a step.

    Raises:
        RecipeError: a step goes back a stage and `any_order` is False; it names both steps.
    """

    parts: tuple[Technique, ...] = ()
    any_order: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, Technique):
                raise RecipeError(f"a recipe is made of techniques, and {part!r} is none")
        last: Technique | None = None
        for step in self.steps:
            if step.stage is None:
                continue
            if last is not None and last.stage is not None and step.stage < last.stage and not self.any_order:
                raise RecipeError(
                    f"{step} ({step.stage.name}) cannot follow {last} ({last.stage.name}): "
                    "put it before, or say any_order if you know why"
                )
            last = step

    @property
    def steps(self) -> tuple[Technique, ...]:
        """The elementary steps, flattened, in order."""
        return tuple(step for part in self.parts for step in part.steps)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What any step needs."""
        return frozenset().union(*(step.needs for step in self.steps))

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield the edits of each step in turn."""
        for index, step in enumerate(self.steps):
            context.step, context.position = str(step), index
            yield from step.edits(model, context)

    def to_json(self) -> Any:
        """Return `{"steps": [...]}`."""
        extra = {"any_order": True} if self.any_order else {}
        return {"steps": [step.to_json() for step in self.parts], **extra}

    def __str__(self) -> str:
        return " -> ".join(map(str, self.steps))
