"""The conformance suite: `check_technique` says whether a technique, ours or a plugin's, keeps every promise of the house.

Each promise is one function below that takes a `_Trial` and raises `AssertionError` with the layer or tensor that broke it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import zoo
from featherweight.artifact import compact
from featherweight.data import Data, Task, as_call, describe, example_inputs, forward, tensors
from featherweight.edits import Edit, Keep, Swap, from_json, named_tensors, replay, to_json
from featherweight.layers import QuantizedLayer
from featherweight.recipe_files import recipe_from_json
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe, Technique
from featherweight.trace import trace

_MILD = 0.1  # of the output's largest magnitude; 8-bit weights and activations stay well inside
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


@dataclass(frozen=True)
class _Trial:
    """One run of a technique: what went in, what came out."""

    technique: Technique
    model: nn.Module
    data: Data
    output: nn.Module
    edits: list[Edit]

    def again(self, technique: Technique | None = None) -> tuple[nn.Module, list[Edit]]:
        return _run(technique or self.technique, self.model, self.data)

    def answers(self, model: nn.Module) -> list[Tensor]:
        return _answers(model, self.data)


def check_technique(technique: Technique, task: Task | None = None) -> None:
    """Check every promise a technique makes, on one model or on each of `zoo.small_models()`.

    Args:
        technique: settings that finish in seconds; one epoch is enough.
        task: a model with its data; every tiny model of the zoo when None.

    Raises:
        AssertionError: a promise is broken; the message names the technique, the model, and the layer or tensor.

    Example:
        >>> check_technique(PruneWeights(ratio=0.5))
    """
    for case in [task] if task is not None else zoo.small_models().values():
        model = copy.deepcopy(case.model)
        _mixed_modes(model)
        before = _everything(model)
        output, edits = _run(technique, model, case.data)
        trial = _Trial(technique, model, case.data, output, edits)
        for check in CHECKS:
            try:
                check(trial)
            except AssertionError as error:
                raise AssertionError(f"{technique} on {case.name}: {check.__name__}: {error}") from error
        changed = _first_difference(before, _everything(model))
        if changed:
            raise AssertionError(f"{technique} on {case.name}: the input model is not as it was: {changed}")


def output_is_plain(trial: _Trial) -> None:
    """Only classes of the input, torch.nn and our kinds; no hooks, no parametrizations, no attributes of their own."""
    known = {type(module) for module in trial.model.modules()}
    for path, module in trial.output.named_modules():
        kind = type(module)
        ours = kind.__module__.startswith(("torch.nn.modules.", "featherweight.layers."))
        _expect(kind in known or ours, f"{path} is a {kind.__module__}.{kind.__qualname__}")
        _expect(not hasattr(module, "parametrizations"), f"{path} is parametrized")
        _expect(not any(getattr(module, table) for table in _HOOKS), f"{path} has hooks")


def output_keeps_its_form(trial: _Trial) -> None:
    """Same structure, shapes, types, device and mode."""
    before, after = _forward(trial.model, trial.data), _forward(trial.output, trial.data)
    _expect(describe(before) == describe(after), f"the output was {describe(before)} and is {describe(after)}")
    for old, new in zip(tensors(before), tensors(after), strict=True):
        _expect(
            old.dtype == new.dtype and old.device == new.device,
            f"{old.dtype} on {old.device} became {new.dtype} on {new.device}",
        )
        _expect(bool(torch.isfinite(new).all()), "the output is not finite")
    modes = {path: module.training for path, module in trial.model.named_modules(remove_duplicate=False)}
    for path, module in trial.output.named_modules(remove_duplicate=False):
        _expect(module.training == modes.get(path, module.training), f"{path or 'the model'} changed its mode")


def edits_tell_everything(trial: _Trial) -> None:
    """Replay on a model with other values, through JSON and compacted, and a strict load give the same model."""
    rows = json.dumps(to_json(trial.edits))
    for how, edits in (
        ("edits", trial.edits),
        ("edits through JSON", from_json(json.loads(rows))),
        ("compact edits", compact(trial.edits)),
    ):
        other = replay(zoo.randomise(copy.deepcopy(trial.model), seed=99), edits)
        try:
            other.load_state_dict(trial.output.state_dict(), strict=True)
        except RuntimeError as error:
            raise AssertionError(f"{how} replay to another structure: {error}") from error
        changed = _first_difference(_structure(trial.output), _structure(other))
        _expect(not changed, f"{how} replay to another structure: {changed}")
        for old, new in zip(trial.answers(trial.output), trial.answers(other), strict=True):
            _expect(
                torch.equal(old, new), f"{how} replay to a model that differs by {float((old - new).abs().max()):.1e}"
            )


def deterministic(trial: _Trial) -> None:
    """A second run under the same seed gives the same bits, whatever the global generators do meanwhile."""
    torch.rand(7)
    twin, _ = trial.again()
    changed = _first_difference(_values(trial.output), _values(twin))
    _expect(not changed, f"two runs under one seed differ: {changed}")


def settings_round_trip(trial: _Trial) -> None:
    """The recipe read back from JSON is equal."""
    recipe = Recipe((trial.technique,))
    back = recipe_from_json(json.loads(json.dumps(recipe.to_json())))
    _expect(back == recipe, f"{recipe.to_json()} reads back as {back}")


def scope_is_respected(trial: _Trial) -> None:
    """What is out of scope is bit-identical, but for the input slices that a cut upstream takes away."""
    paths = [path for path, module in trial.model.named_modules() if path and module._parameters]
    for path in {paths[0], paths[len(paths) // 2]}:
        output, edits = trial.again(only(path, trial.technique))
        before, after = _values(trial.model), _values(output)
        shared = {
            id(value) for name, value in named_tensors(trial.model).items() if (name + ".").startswith(path + ".")
        }
        for edit in edits:
            for cut in edit.cuts if isinstance(edit, Keep) else ():
                inside = (cut.tensor + ".").startswith(path + ".")
                _expect(
                    inside or cut.dim > 0 or before[cut.tensor].dim() == 1,
                    f"only({path!r}) cut outputs of {cut.tensor}",
                )
                before[cut.tensor] = before[cut.tensor].index_select(cut.dim, torch.tensor(cut.index))
        for name, value in before.items():
            inside = (name + ".").startswith(path + ".") or id(named_tensors(trial.model)[name]) in shared
            _expect(inside or (name in after and torch.equal(value, after[name])), f"only({path!r}) changed {name}")


def mildest_is_nearly_identity(trial: _Trial) -> None:
    """The setting nearest the identity changes next to nothing."""
    mildest = trial.technique.mildest()
    if mildest is None:
        return
    output, _ = trial.again(mildest)
    for old, new in zip(trial.answers(trial.model), trial.answers(output), strict=True):
        gap = float((old - new).abs().max() / old.abs().max())
        _expect(gap <= _MILD, f"{mildest} changes the output by {gap:.0%} of its largest value")


def bits_never_grow(trial: _Trial) -> None:
    """No replaced layer, and not the whole, takes more bits than before; a bias that folding adds is forgiven."""
    known = dict(trial.model.named_modules(remove_duplicate=False))
    for path in {edit.path for edit in trial.edits if isinstance(edit, Swap)} & set(known):
        old, new = (model.get_submodule(path) for model in (trial.model, trial.output))
        fresh_bias = 32 * sum(value.numel() for name, value in named_tensors(new).items() if name.endswith("bias"))
        before, after = stored_bits(old), stored_bits(new)
        _expect(
            after <= before + (0 if getattr(old, "bias", None) is not None else fresh_bias),
            f"{path} grew from {before} to {after} bits",
        )
    before, after = stored_bits(trial.model), stored_bits(trial.output)
    _expect(after <= before, f"the model grew from {before} to {after} bits")


def export_succeeds(trial: _Trial) -> None:
    """`torch.export` can follow the output wherever it could follow the input."""
    trace(trial.output, *as_call(example_inputs(trial.data)))


def ties_stay_tied(trial: _Trial) -> None:
    """Tensors and modules under two names are still one object, where both names are still there."""
    before, after = (_holders(model) for model in (trial.model, trial.output))
    for name, same in before.items():
        for other in same:
            if name in after and other in dict(_named(trial.output)):
                _expect(other in after[name], f"{name} and {other} were one and are two")


CHECKS: tuple[Callable[[_Trial], None], ...] = (
    output_is_plain,
    output_keeps_its_form,
    edits_tell_everything,
    deterministic,
    settings_round_trip,
    scope_is_respected,
    mildest_is_nearly_identity,
    bits_never_grow,
    export_succeeds,
    ties_stay_tied,
)


def stored_bits(module: nn.Module) -> int:
    """Return the bits of every tensor of the state, once, before entropy coding; codes count as their width."""
    widths = {id(layer.codes): layer.bits for layer in module.modules() if isinstance(layer, QuantizedLayer)}
    unique = {id(tensor): tensor for tensor in named_tensors(module).values()}
    return sum(tensor.numel() * widths.get(key, 8 * tensor.element_size()) for key, tensor in unique.items())


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _run(technique: Technique, model: nn.Module, data: Data) -> tuple[nn.Module, list[Edit]]:
    teacher = copy.deepcopy(model).eval()
    output, edits = run(technique, model, Context(data=data, teacher=teacher, seed=5))
    return output, edits


def _mixed_modes(model: nn.Module) -> None:
    """Put one layer into training mode and give one parameter a gradient, so that losing either shows."""
    next(model.children()).train()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)


def _forward(model: nn.Module, data: Data) -> Any:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return forward(model, example_inputs(data, batch=3))


def _answers(model: nn.Module, data: Data) -> list[Tensor]:
    return list(tensors(_forward(model, data)))


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named_tensors(model).items()}


def _structure(model: nn.Module) -> dict[str, Any]:
    """Classes, plain attributes, and names, shapes and types of tensors, by path."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = type(module)
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | tuple | type(None))
            found[f"{path}.{name}"] = (
                value if plain else sorted(map(str, value)) if isinstance(value, dict | set) else type(value)
            )
    for name, tensor in named_tensors(model).items():
        found[f"tensor {name}"] = (type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad)
    return found


def _everything(model: nn.Module) -> dict[str, Any]:
    """What a run must leave as it was: structure, identities, values, gradients."""
    found = _structure(model)
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"identity of {path}"] = id(module)
    for name, tensor in named_tensors(model).items():
        found[f"identity of {name}"] = id(tensor)
        found[f"values of {name}"] = tensor.detach().clone()
        found[f"gradient of {name}"] = tensor.grad.clone() if tensor.grad is not None else None
    return found


def _first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Name the first key that differs, or return an empty string."""
    for key in [*before, *after]:
        if key not in before or key not in after:
            return f"{key} is {'new' if key in after else 'gone'}"
        old, new = before[key], after[key]
        same = torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old == new
        if not same:
            return key
    return ""


def _named(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from named_tensors(model).items()
    yield from model.named_modules(remove_duplicate=False)


def _holders(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a tensor or module, all the names of the same object."""
    names: dict[int, list[str]] = {}
    for name, value in _named(model):
        names.setdefault(id(value), []).append(name)
    return {name: names[id(value)] for name, value in _named(model)}


__all__ = ["CHECKS", "check_technique", "stored_bits"]
