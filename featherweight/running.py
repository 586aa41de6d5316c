"""`run`: apply a technique to a private copy of a model; every edit is checked, or taken back and explained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Inputs, describe, example_inputs, forward, tensors
from featherweight.edits import Edit, Keep, Swap, apply, module_at, private_copy
from featherweight.errors import FeatherweightError, ModelError, RecipeError
from featherweight.masking import masked
from featherweight.modes import branching, evaluating
from featherweight.sizes import alternatives
from featherweight.technique import Context, Technique

Mode = Callable[[nn.Module], AbstractContextManager[None]]
MASKED_TOLERANCE = 1e-3
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Outcome:
    """What `run` gives back; unpacks as `(model, edits)`."""

    model: nn.Module
    edits: list[Edit]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.edits))


def run(technique: Technique, model: nn.Module, context: Context) -> Outcome:
    """Apply a technique to a private copy of the model, checking the forward after each edit.

    An edit after which the model no longer runs or gives another output structure is undone, and so is a cut that differs from
    the model with the removed slices zeroed, or runs no longer in training; the technique is told, and `context.untouched` says why.

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
    if not context.step:  # a checkpoint is named after it
        context = replace(context, step=str(technique))
    copied, baked = private_copy(model)
    copied.to(context.device)
    for name in baked:
        context.leave(name, "computed from other tensors at each forward; baked into a plain weight first")
    inputs = example_inputs(context.data, context.device)
    expected = _shape_of(_try_forward(copied, inputs, "before any change"))
    calls, done = _Calls(copied, inputs), list[Edit]()
    generator = technique.edits(copied, context)
    try:
        edit = next(generator)
        while True:
            asked = edit if isinstance(edit, tuple) else (edit,)
            kept = _applied(copied, asked, inputs, expected, calls, context)
            done += kept
            edit = generator.send(len(kept) == len(asked))
    except StopIteration:
        pass
    except FeatherweightError as error:
        error.add_note(f"while applying {context.step or technique} to {type(model).__name__}")
        raise
    return Outcome(copied, done)


def _applied(
    model: nn.Module, edits: tuple[Edit, ...], inputs: Inputs, expected: str, calls: _Calls, context: Context
) -> list[Edit]:
    """Apply edits and return those that stayed: checked once together, and by halves where that fails.

    A cut is held against its own masked model, and so never shares a check.
    """
    if len(edits) < 2 or any(isinstance(edit, Keep) for edit in edits):
        kept = [_checked_apply(model, edit, inputs, expected, calls, context) for edit in edits]
        return [edit for edit in kept if edit is not None]
    back: list[Callable[[], None]] = []
    try:
        for edit in edits:
            back.append(apply(model, edit))
        wrong = _what_is_wrong(model, edits, inputs, expected, calls, None)
    except ModelError as error:
        wrong = str(error)
    if not wrong:
        for edit in edits:
            context.sparse.update(getattr(edit, "sparse", ()))
        return list(edits)
    for undo in reversed(back):
        undo()
    middle = len(edits) // 2
    return [
        edit
        for half in (edits[:middle], edits[middle:])
        for edit in _applied(model, half, inputs, expected, calls, context)
    ]


def _checked_apply(
    model: nn.Module, edit: Edit, inputs: Inputs, expected: str, calls: _Calls, context: Context
) -> Edit | None:
    """Apply an edit, or a variant of it, and return what stayed; None after undoing it."""
    reference = _reference(model, edit, inputs) if isinstance(edit, Keep) else None
    branches = reference is not None and calls.branches
    reason = ""
    for variant in (edit, *alternatives(model, edit)) if isinstance(edit, Keep) else (edit,):
        try:
            undo = apply(model, variant)
        except ModelError as error:
            reason = reason or str(error)
            break
        wrong = _what_is_wrong(model, (variant,), inputs, expected, calls, reference)
        if branches and not wrong:
            wrong = _why_it_cannot_train(model, inputs)
        if not wrong:
            context.sparse.update(getattr(variant, "sparse", ()))
            return variant
        undo()
        reason = reason or wrong
    _refuse(context, edit, reason)
    return None


def _refuse(context: Context, edit: Edit, reason: str) -> None:
    path = edit.path if isinstance(edit, Swap) else edit.cuts[0].tensor if isinstance(edit, Keep) else "the model"
    context.leave(path, f"undone: {reason}")


def _what_is_wrong(
    model: nn.Module,
    edits: tuple[Edit, ...],
    inputs: Inputs,
    expected: str,
    calls: _Calls,
    reference: list[Tensor] | None,
) -> str:
    """Return why the model cannot stay like this, or an empty string."""
    try:
        output, bypassed = calls.checked([edit.path for edit in edits if isinstance(edit, Swap)])
    except ModelError as error:
        return str(error)
    if bypassed:
        return f"its parent reads the weight of {bypassed[0]} and never calls it, so a replacement would be bypassed"
    if _shape_of(output) != expected:
        return f"the output became {_shape_of(output)} where it was {expected}"
    if reference is not None:
        for before, after in zip(reference, tensors(output), strict=True):
            gap = float((before - after).abs().max()) / max(1.0, float(before.abs().max()))
            if not gap <= MASKED_TOLERANCE:
                return f"the cut model differs by {gap:.1e} from the same model with the removed channels zeroed"
    return ""


def _why_it_cannot_train(model: nn.Module, inputs: Inputs) -> str:
    """Return why the forward fails where it goes the way that it goes in training, or an empty string."""
    try:
        _try_forward(model, inputs, "in training, after the change", branching)
    except ModelError as error:
        return str(error)
    return ""


class _Calls:
    """Runs the model after a change, and knows which modules the forward calls, from hooks where a Swap has put new ones.

    They watch a pass of their own where there is a layer that PyTorch computes in one operator: a hook would switch that off.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.known: set[str] | None = None

    @cached_property
    def branches(self) -> bool:
        """Whether the forward does something else in training than in evaluation, beside what layers do, as it was when first asked.

        Structure that only training sees is none that a cut knows: the half of an autoencoder's variances, an auxiliary head.
        """
        try:
            trained = _try_forward(self.model, self.inputs, "in training", branching)
        except ModelError:
            return False
        plain = _try_forward(self.model, self.inputs, "before any change")
        return _shape_of(trained) != _shape_of(plain) or not all(map(torch.equal, tensors(trained), tensors(plain)))

    def checked(self, paths: list[str]) -> tuple[Any, list[str]]:
        """Return the output, and which of these paths the forward does not call, after Swaps there.

        Raises:
            ModelError: the forward fails.
        """
        unknown = self._unknown(paths)
        if not unknown or any(isinstance(module, _FUSED) for module in self.model.modules()):
            output = _try_forward(self.model, self.inputs, "after the change")
            if unknown:
                self._watched(unknown)
        else:
            output = self._watched(unknown)
        known = self.known or set()
        return output, [path for path in paths if path in unknown and path not in known]

    def _unknown(self, paths: list[str]) -> Mapping[str, nn.Module]:
        """The modules to watch: all at first, and then those of the paths that are not known to be called."""
        if self.known is None:
            return dict(self.model.named_modules(remove_duplicate=False)) if paths else {}
        for path in paths:
            inside = f"{path}." if path else ""
            self.known -= {known for known in self.known if known.startswith(inside) and known != path}
        return {path: module_at(self.model, path) for path in paths if path not in self.known}

    def _watched(self, modules: Mapping[str, nn.Module]) -> Any:
        called: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
            for path, module in modules.items()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            output = _try_forward(self.model, self.inputs, "after the change")
        finally:
            for hook in hooks:
                hook.remove()
        self.known = (self.known or set()) | called
        return output


def _reference(model: nn.Module, edit: Keep, inputs: Inputs) -> list[Tensor] | None:
    """What the cut model must give; None where the cut itself is wrong, which applying it explains."""
    try:
        with masked(model, edit):
            return list(tensors(_try_forward(model, inputs, "with channels switched off")))
    except (KeyError, IndexError, ModelError):
        return None


def _try_forward(model: nn.Module, inputs: Inputs, when: str, mode: Mode = evaluating) -> Any:
    with mode(model):
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
