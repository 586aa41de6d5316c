"""Sums of distillation losses as text, and the matching points they name: captured with hooks, fitted by projections."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Inputs, forward, tensors
from featherweight.edits import module_at
from featherweight.errors import ModelError, RecipeError, closest
from featherweight.modes import evaluating
from featherweight.techniques.imitation import OUTPUT_LOSSES, attention_transfer, hint, relational, self_relation

FEATURE_LOSSES: dict[str, tuple[Callable[..., Tensor], float]] = {
    "hint": (hint, 1.0),
    "attention": (attention_transfer, 10.0),
    "relational": (relational, 25.0),  # angles weigh 50, as in the paper's code
    "relations": (self_relation, 1.0),
}
"""By name, the loss and its weight where the text gives none."""
_TERM = re.compile(r"(?:([\d.]+(?:e-?\d+)?)\s*\*\s*)?(\w+)(?:\s+([\w.]+)(?:\s*->\s*([\w.]+))?)?")
_PROJECTED = ("query", "key", "value")
_HEADS = ("heads", "num_attention_heads")


@dataclass(frozen=True)
class Term:
    """One loss of a sum.

    Attributes:
        loss: a name in `OUTPUT_LOSSES` or `FEATURE_LOSSES`.
        weight: its factor, above 0.
        student: dotted path of the module whose output is matched; empty for losses on the models' outputs.
        teacher: the same in the teacher.
    """

    loss: str
    weight: float = 1.0
    student: str = ""
    teacher: str = ""


def terms(text: str) -> tuple[Term, ...]:
    """Return the terms of a sum such as `"dkd + 0.5 * hint layer2 -> layer3 + attention layer1"`.

    A term is a loss on outputs, or a loss on features followed by the path of a module of the student and, after an arrow,
    of the teacher; one path stands for both. A weight may stand before it.

    Raises:
        RecipeError: a term cannot be read, its loss is unknown, or a path is missing or too many.
    """
    found = []
    for part in str(text).split("+"):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise RecipeError(
                f"distill: loss={text!r}: {part.strip()!r} cannot be read: write sums such as "
                "'soft_targets + 0.5 * hint layer2 -> layer3'"
            )
        weight, loss, student, teacher = match.groups()
        known = (*OUTPUT_LOSSES, *FEATURE_LOSSES)
        if loss not in known:
            raise RecipeError(
                f"distill: loss={text!r}: {loss!r} is not one of {', '.join(known)}.{closest(loss, known)}"
            )
        if (student is not None) != (loss in FEATURE_LOSSES):
            wants = "the path of a module after it" if student is None else "no path: it compares the models' outputs"
            raise RecipeError(f"distill: loss={text!r}: {loss} wants {wants}")
        usual = FEATURE_LOSSES[loss][1] if loss in FEATURE_LOSSES else 1.0
        factor = _number(weight, text) if weight is not None else usual
        found.append(Term(loss, factor, student or "", teacher or student or ""))
    return tuple(found)


def _number(weight: str, text: str) -> float:
    try:
        return float(weight)
    except ValueError as error:
        raise RecipeError(f"distill: loss={text!r}: {weight!r} is no number") from error


@contextmanager
def captured(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Give a dict that holds, after a forward, the first tensor of each module's output; the hooks go, also on error.

    Args:
        model: whose modules are watched.
        paths: dotted paths; the last call of a module counts.

    Raises:
        ModelError: a path is not there.
    """
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def watch(path: str) -> None:
        def see(_: nn.Module, __: Any, output: Any) -> None:
            seen[path] = next(tensors(output))

        handles.append(module_at(model, path).register_forward_hook(see))

    try:
        for path in paths:
            watch(path)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Matching(nn.Module):
    """The losses on features, with the linear projections that fit sizes; they are trained along and dropped afterwards.

    Args:
        found: terms; those on outputs are passed over.
        student: the model to train.
        teacher: the model to follow.
        inputs: of one batch; both models run on it once to learn the sizes.

    Raises:
        ModelError: a path is missing or not called, or features cannot be fitted to each other; it names both.
    """

    def __init__(self, found: Iterable[Term], student: nn.Module, teacher: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.pairs = [pair for term in found if term.student for pair in _pairs(term, teacher)]
        self.student_paths = [pair.student for pair in self.pairs]
        self.teacher_paths = [pair.teacher for pair in self.pairs]
        self.projections = nn.ModuleList()
        if not self.pairs:
            return
        seen, wanted = (
            _called(model, paths, inputs)
            for model, paths in ((student, self.student_paths), (teacher, self.teacher_paths))
        )
        for pair in self.pairs:
            self.projections.append(_projection(pair, seen[pair.student], wanted[pair.teacher]))

    def forward(self, seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses on what was captured from the student and from the teacher.

        Raises:
            ModelError: a matched module was not called for this batch.
        """
        losses = []
        for pair, projection in zip(self.pairs, self.projections, strict=True):
            for table, path in ((seen, pair.student), (wanted, pair.teacher)):
                if path not in table:
                    raise ModelError(f"{path} is a matching point and was not called: name a module that always is")
            given, goal = seen[pair.student].float(), wanted[pair.teacher].detach().float()
            losses.append(pair.weight * _distance(pair, projection, given, goal))
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class _Pair(Term):
    """A term whose paths are both captured as they are; relations of an attention module are three of them."""

    heads: int = 1


def _pairs(term: Term, teacher: nn.Module) -> list[_Pair]:
    if term.loss != "relations":
        return [_Pair(term.loss, term.weight, term.student, term.teacher)]
    attention = module_at(teacher, term.teacher)
    heads = next((getattr(attention, name) for name in _HEADS if isinstance(getattr(attention, name, None), int)), 1)
    return [
        _Pair(term.loss, term.weight, f"{term.student}.{part}", f"{term.teacher}.{part}", heads) for part in _PROJECTED
    ]


def _called(model: nn.Module, paths: list[str], inputs: Inputs) -> dict[str, Tensor]:
    with captured(model, paths) as seen, evaluating(model):
        forward(model, inputs)
    for path in paths:
        if path not in seen:
            raise ModelError(f"{path} is a matching point and {type(model).__name__} does not call it on its example")
    return seen


def _projection(pair: _Pair, given: Tensor, wanted: Tensor) -> nn.Module:
    """A linear layer over the one dimension whose size differs, or an identity where nothing has to be fitted."""
    unlike = f"{pair.loss} {pair.student} -> {pair.teacher}: features {list(given.shape)} and {list(wanted.shape)}"
    if pair.loss == "relational":
        return nn.Identity()
    if given.dim() != wanted.dim() or given.dim() < 2:
        raise ModelError(f"{unlike} have no dimensions in common to be compared on: name other modules")
    if pair.loss == "relations":
        if given.dim() != 3 or given.shape[1] != wanted.shape[1]:
            raise ModelError(f"{unlike} are not both [batch, steps, width] of the same steps")
        return nn.Identity()
    given, wanted = _same_places(given, wanted)
    if pair.loss == "attention":
        if given.dim() < 3 or given.shape[2:] != wanted.shape[2:]:
            raise ModelError(f"{unlike} are not both [batch, channels, ...] with as many places")
        return nn.Identity()
    differing = _differing(given, wanted)
    if not differing:
        return nn.Identity()
    if len(differing) > 1 or differing[0] == 0:
        raise ModelError(f"{unlike} differ in more than their channels: name modules of like sizes")
    return nn.Linear(given.shape[differing[0]], wanted.shape[differing[0]]).to(given.device)


def _differing(given: Tensor, wanted: Tensor) -> list[int]:
    return [dim for dim in range(given.dim()) if given.shape[dim] != wanted.shape[dim]]


def _same_places(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Pool feature maps `[batch, channels, height, width]` (or with depth) to the smaller of both sizes."""
    if given.dim() < 4 or given.shape[2:] == wanted.shape[2:]:
        return given, wanted
    size = [min(pair) for pair in zip(given.shape[2:], wanted.shape[2:], strict=True)]
    pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if given.dim() == 4 else F.adaptive_avg_pool3d
    return pool(given, size), pool(wanted, size)


def _distance(pair: _Pair, projection: nn.Module, given: Tensor, wanted: Tensor) -> Tensor:
    if pair.loss == "relations":
        heads = math.gcd(pair.heads, given.shape[-1], wanted.shape[-1])
        return self_relation(given, wanted, heads)
    if pair.loss in ("hint", "attention"):
        given, wanted = _same_places(given, wanted)
    if isinstance(projection, nn.Linear):
        (dim,) = _differing(given, wanted)
        given = projection(given.movedim(dim, -1)).movedim(-1, dim)
    return FEATURE_LOSSES[pair.loss][0](given, wanted)
