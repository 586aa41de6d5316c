"""Students made out of the user's own model, and teachers' assistants between a model and a much smaller one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from featherweight.data import Data, complete
from featherweight.edits import private_copy
from featherweight.errors import RecipeError
from featherweight.running import run
from featherweight.technique import Context, Technique
from featherweight.techniques import PruneBlocks, PruneChannels, SeparateConvolutions

OPERATORS = (None, "depthwise_separable")


def student_of(
    model: nn.Module,
    data: Data,
    width: float = 0.5,
    depth: float = 1.0,
    operators: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a smaller model of the same form, cut out of a trained one so that it inherits its weights.

    The same steps stand in a recipe as `prune_blocks`, `prune_channels` and `separate_convolutions`; a student is for a
    teacher that is another model than the one that is compressed, and for chains. It starts weak: train it with `Distill`.

    Args:
        model: trained; it is not changed.
        data: example and a loader.
        width: share of the channels, heads and units that stay, above 0 to 1.
        depth: share of the residual blocks that stay, above 0 to 1.
        operators: `"depthwise_separable"` puts depthwise and pointwise convolutions in place of dense ones; None leaves them.
        seed: of every draw.

    Raises:
        RecipeError: a setting is out of range, or the model has nothing of what it asks to be made less.
    """
    if operators not in OPERATORS:
        raise RecipeError(f"student_of: operators={operators!r} is not one of {', '.join(map(repr, OPERATORS))}")
    if not (0 < width <= 1 and 0 < depth <= 1):
        raise RecipeError(f"student_of: width={width} and depth={depth} must be above 0 and at most 1")
    steps: list[Technique] = []
    if depth < 1:
        steps.append(PruneBlocks(ratio=min(0.99, 1 - depth)))
    if width < 1:
        steps.append(PruneChannels(ratio=min(0.99, 1 - width)))
    if operators is not None:
        steps.append(SeparateConvolutions())
    context = Context(data=complete(data)[0], seed=seed)
    student, _ = private_copy(model)
    for context.position, step in enumerate(steps):
        context.step = str(step)
        student, edits = run(step, student, context)
        if not edits:
            why = "; ".join(f"{left.path or 'the model'}: {left.reason}" for left in context.untouched[:4])
            raise RecipeError(f"student_of: {step} found nothing to do in {type(model).__name__}: {why}")
    return student


def teach(students: Iterable[nn.Module], teacher: nn.Module, technique: Technique, context: Context) -> nn.Module:
    """Train each student with the one before it as teacher, and return the last, in evaluation mode.

    Ever smaller ones are teachers' assistants (Mirzadeh et al., AAAI 2020); fresh copies of the teacher's own network are
    born-again ones, a self-distillation (Furlanello et al., ICML 2018).

    Args:
        students: in the order in which they are taught; they are not changed.
        teacher: of the first.
        technique: how, such as `Distill(epochs=30)`.
        context: data, device and seed; its teacher is not used.
    """
    for student in students:
        outcome = run(technique, student, replace(context, teacher=teacher.to(context.device).eval()))
        teacher = outcome.model
    return teacher.eval()
