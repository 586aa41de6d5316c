"""`Technique`, `Recipe`, `only` and `run`: techniques decide, edits act, and every edit is checked or taken back."""

from __future__ import annotations

import copy
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
from torch import Tensor, nn

from featherweight.data import Data, Inputs, describe, example_inputs, forward, tensors
from featherweight.edits import Edit, Keep, Swap, Write, apply, masked_state, module_at
from featherweight.errors import FeatherweightError, ModelError, RecipeError, closest
from featherweight.modes import evaluating

Layer = TypeVar("Layer", bound=nn.Module)
Report = Callable[[str, float], None]
"""Takes a one-line message and the share of that work done, 0 to 1."""

Edits = Generator[Edit, bool, None]
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


@dataclass(frozen=True)
class Outcome:
    """What `run` gives back; unpacks as `(model, edits)`."""

    model: nn.Module
    edits: list[Edit]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.edits))


def run(technique: Technique, model: nn.Module, context: Context) -> Outcome:
    """Apply a technique to a private copy of the model, checking the forward after each edit.

    An edit after which the model no longer runs, gives another output structure, or (for a cut) differs from the model
    with the removed slices zeroed, is undone; the technique is told, and `context.untouched` says why.

    Args:
        technique: a step or a recipe.
        model: the user's model; it is not changed.
        context: data, teacher, device, seed.

    Raises:
        RecipeError: the technique needs a loader that the data does not have, or matches nothing.
        ModelError: the model does not run on `data.example`.
    """
    for split in sorted(technique.needs):
        if getattr(context.data, split) is None:
            raise RecipeError(f"{technique} needs Data({split}=...), which is missing")
    copied = copy.deepcopy(model).to(context.device)
    inputs = example_inputs(context.data, context.device)
    expected = _shape_of(_try_forward(copied, inputs, "before any change"))
    done: list[Edit] = []
    generator = technique.edits(copied, context)
    try:
        edit = next(generator)
        while True:
            kept = _checked_apply(copied, edit, inputs, expected, context)
            if kept:
                done.append(edit)
            edit = generator.send(kept)
    except StopIteration:
        pass
    except FeatherweightError as error:
        error.add_note(f"while applying {context.step or technique} to {type(model).__name__}")
        raise
    return Outcome(copied, done)


def _checked_apply(model: nn.Module, edit: Edit, inputs: Inputs, expected: str, context: Context) -> bool:
    reference = _masked_output(model, edit, inputs) if isinstance(edit, Keep) else None
    try:
        undo = apply(model, edit)
    except ModelError as error:
        _refuse(context, edit, str(error))
        return False
    reason = _what_is_wrong(model, edit, inputs, expected, reference)
    if reason:
        undo()
        _refuse(context, edit, reason)
        return False
    context.sparse.update(getattr(edit, "sparse", ()))
    return True


def _refuse(context: Context, edit: Edit, reason: str) -> None:
    path = edit.path if isinstance(edit, Swap) else edit.cuts[0].tensor if isinstance(edit, Keep) else "the model"
    context.leave(path, f"undone: {reason}")


def _what_is_wrong(model: nn.Module, edit: Edit, inputs: Inputs, expected: str, reference: list[Tensor] | None) -> str:
    """Return why the model cannot stay like this, or an empty string."""
    try:
        output = _try_forward(model, inputs, "after the change")
    except ModelError as error:
        return str(error)
    if isinstance(edit, Swap) and not _is_called(model, edit.path, inputs):
        return f"its parent reads the weight of {edit.path} and never calls it, so a replacement would be bypassed"
    if _shape_of(output) != expected:
        return f"the output became {_shape_of(output)} where it was {expected}"
    if reference is not None:
        for before, after in zip(reference, tensors(output), strict=True):
            gap = float((before - after).abs().max()) / max(1.0, float(before.abs().max()))
            if not gap <= MASKED_TOLERANCE:
                return f"the cut model differs by {gap:.1e} from the same model with the removed channels zeroed"
    return ""


def _is_called(model: nn.Module, path: str, inputs: Inputs) -> bool:
    """Whether the module's forward runs; a forward of its own, since a hook switches off PyTorch's fused encoder layer."""
    called: list[str] = []
    hook = module_at(model, path).register_forward_hook(lambda *_: called.append(path))
    try:
        _try_forward(model, inputs, "with a hook")
    finally:
        hook.remove()
    return bool(called)


def _masked_output(model: nn.Module, edit: Keep, inputs: Inputs) -> list[Tensor] | None:
    """What the model gives with the removed slices zeroed.

    In place and undone, because `functional_call` corrupts a model that registers one module twice.
    """
    try:
        undo = apply(model, Write(masked_state(model, edit)))
    except (KeyError, IndexError, ModelError):
        return None  # applying the edit says why
    try:
        return list(tensors(_try_forward(model, inputs, "with channels zeroed")))
    finally:
        undo()


def _try_forward(model: nn.Module, inputs: Inputs, when: str) -> Any:
    with evaluating(model):
        try:
            return forward(model, inputs)
        except FeatherweightError:
            raise
        except Exception as error:  # whatever the user's forward raises
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{type(model).__name__} does not run on its example {describe(inputs)} {when}: {line}"
            ) from error


def _shape_of(output: Any) -> str:
    return describe(output) + " " + ", ".join(str(tensor.dtype) for tensor in tensors(output))
