"""The three edits, the only code that changes a model's structure: Keep (slice), Swap (replace a layer), Write (values).

Edits name tensors by dotted state-dict names and modules by dotted paths. As JSON they hold structure only (sizes, kinds
and options); the values live in the state dict, so that `replay` on a model of the original class followed by a strict
load gives the compressed model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from featherweight.errors import ArtifactError, ModelError, closest
from featherweight.layers import QuantizedLayer, build

Undo = Callable[[], None]
_LONGEST = 1 << 22  # entries of one dimension; a damaged file must not cost memory


@dataclass(frozen=True)
class Cut:
    """Keep the entries `index` of dimension `dim` of one parameter or buffer, in this order."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """Slice coupled tensors, all or none.

    Attributes:
        cuts: what each tensor keeps.
        sizes: new values of integer attributes by dotted path, such as `("conv1.out_channels", 12)`, or of one entry of a
            tuple of them, `("norm.normalized_shape.0", 12)`.
    """

    cuts: tuple[Cut, ...]
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Swap:
    """Put a layer of a kind at a path, for every holder of the module that was there.

    Attributes:
        path: dotted path of the module to replace.
        kind: a name in `featherweight.layers.KINDS`.
        options: JSON-able keyword arguments that build it.
        state: its state dict; None leaves the fresh values, to be loaded later.
    """

    path: str
    kind: str
    options: Mapping[str, Any]
    state: Mapping[str, Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Write:
    """Give tensors new values.

    Attributes:
        state: new values by name, shapes unchanged; None when training has changed the model in place.
        sparse: names of tensors whose zeros later training must keep.
    """

    state: Mapping[str, Tensor] | None = field(default=None, repr=False)
    sparse: tuple[str, ...] = ()


Edit = Keep | Swap | Write


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by its dotted names; a tied tensor appears under each of them."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        ModelError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        paths = [name for name, _ in model.named_modules() if name]
        raise ModelError(f"{type(model).__name__} has no module at {path!r}.{closest(path, paths)}") from error


def private_copy(model: nn.Module, values: bool = True) -> tuple[nn.Module, list[str]]:
    """Return a copy to edit, its parametrized weights (weight norm and the like) baked into plain ones, and their names.

    Edits address tensors by name, and a weight that is computed anew at each forward would undo them.

    Args:
        model: any module; it is not changed.
        values: False leaves the tensors of the state dict without memory, on the device `meta`, to be given others.

    Raises:
        ModelError: the model is a wrapper around another or compiled, or PyTorch cannot copy it.
    """
    compiled = hasattr(model, "_orig_mod")  # its class would take a second to import
    if compiled or isinstance(model, nn.DataParallel | DistributedDataParallel):
        inside = "model._orig_mod" if compiled else "model.module"
        raise ModelError(f"{type(model).__name__} wraps the model whose layers are meant: give that, {inside}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a scripted or traced model has no layers that could be replaced: give the nn.Module it was made from"
        )
    instead = (
        {} if values else {id(tensor): _without_memory(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    )
    try:
        copied = copy.deepcopy(model, instead)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): remove old-style weight norm, spectral "
            "norm and pruning masks first (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
        ) from error
    baked: list[str] = []
    for path, module in list(copied.named_modules()):
        if parametrize.is_parametrized(module):
            # its generated class is the original's too, and baking takes the weight's property off the class
            shared = type(module)
            own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, own)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                baked.append(f"{path}.{name}".lstrip("."))
    return copied, baked


def _without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def apply(model: nn.Module, edit: Edit) -> Undo:
    """Change the model in place and return a function that takes the change back.

    Raises:
        ModelError: a path or a tensor is missing, or a shape does not fit; the model is then as it was.
    """
    if isinstance(edit, Keep):
        return _apply_keep(model, edit)
    if isinstance(edit, Swap):
        return _apply_swap(model, edit)
    return _apply_write(model, edit)


def _holders(model: nn.Module, wanted: Tensor | nn.Module) -> list[tuple[nn.Module, str]]:
    """All (module, attribute) pairs that hold this very tensor or module."""
    held: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        own: list[Mapping[str, Any]] = (
            [module._modules] if isinstance(wanted, nn.Module) else [module._parameters, module._buffers]
        )
        held += [(module, name) for table in own for name, value in table.items() if value is wanted]
    return held


def _replace(holders: Iterable[tuple[nn.Module, str]], value: Tensor | nn.Module) -> None:
    for module, name in holders:
        table: dict[str, Any] = next(t for t in (module._modules, module._parameters, module._buffers) if name in t)
        table[name] = value
        if isinstance(module, nn.RNNBase):  # it computes from a list of its own
            module._flat_weights = [getattr(module, weight, None) for weight in module._flat_weights_names]


def _apply_keep(model: nn.Module, edit: Keep) -> Undo:
    tensors, stored = named_tensors(model), model.state_dict(keep_vars=True)
    changes: list[tuple[list[tuple[nn.Module, str]], Tensor]] = []
    by_tensor: dict[int, tuple[Tensor, list[Cut]]] = {}
    for cut in edit.cuts:
        if cut.tensor not in tensors:
            raise ModelError(f"{type(model).__name__} has no tensor {cut.tensor!r}.{closest(cut.tensor, tensors)}")
        if cut.tensor not in stored:
            raise ModelError(
                f"{cut.tensor} is not in the state dict (persistent=False), so a cut of it could not be stored"
            )
        by_tensor.setdefault(id(tensors[cut.tensor]), (tensors[cut.tensor], []))[1].append(cut)
    for tensor, cuts in by_tensor.values():
        value = tensor.detach()
        for cut in _one_a_dimension(cuts):
            if not 0 <= cut.dim < tensor.dim() or not _within(cut.index, tensor.shape[cut.dim]):
                raise ModelError(
                    f"{cut.tensor} {list(tensor.shape)} has no entries {cut.index[-3:]} on dimension {cut.dim}"
                )
            value = value.index_select(cut.dim, torch.tensor(cut.index, dtype=torch.long, device=value.device))
        if _channels_last(tensor):
            value = value.contiguous(memory_format=torch.channels_last)
        kept: Tensor = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        changes.append((_holders(model, tensor), kept))
    sizes: dict[tuple[nn.Module, str], int | tuple[int, ...]] = {}
    for path, size in edit.sizes:
        _set_size(model, path, size, sizes)
    before = {place: getattr(*place) for place in sizes}
    old = [(holders, _held(holders)) for holders, _ in changes]
    for holders, value in changes:
        _replace(holders, value)
    for place, new in sizes.items():
        setattr(*place, new)

    def undo() -> None:
        for holders, value in old:
            _replace(holders, value)
        for place, value in before.items():
            setattr(*place, value)

    return undo


def _channels_last(tensor: Tensor) -> bool:
    """Whether a convolution's weight lies so; it then trains faster, and every edit leaves it so."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _set_size(
    model: nn.Module, path: str, size: int, sizes: dict[tuple[nn.Module, str], int | tuple[int, ...]]
) -> None:
    """Note the new value of an integer attribute, or of one entry of a tuple of them.

    Raises:
        ModelError: the attribute is neither.
    """
    owner, _, name = path.rpartition(".")
    if name.isdecimal():
        place, (owner, _, name) = int(name), owner.rpartition(".")
        module = module_at(model, owner)
        entries = sizes.get((module, name), getattr(module, name, None))
        if isinstance(entries, tuple) and place < len(entries):
            sizes[module, name] = (*entries[:place], size, *entries[place + 1 :])
            return
    module = module_at(model, owner)
    value = getattr(module, name, None)
    if type(value) is not int:
        raise ModelError(f"{path} is {value!r}, not an integer size, and cannot become {size}")
    sizes[module, name] = size


def _one_a_dimension(cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts of one tensor; a tied tensor may be named twice, if both names keep the same."""
    found: dict[int, Cut] = {}
    for cut in cuts:
        other = found.setdefault(cut.dim, cut)
        if other.index != cut.index:
            raise ModelError(f"{cut.tensor} and {other.tensor} are one tensor, cut in two ways on dimension {cut.dim}")
    return list(found.values())


def _within(index: tuple[int, ...], size: int) -> bool:
    return not index or (min(index) >= 0 and max(index) < size)


def _held(holders: Sequence[tuple[nn.Module, str]]) -> Tensor:
    module, name = holders[0]
    value: Tensor = getattr(module, name)
    return value


def _apply_swap(model: nn.Module, edit: Swap) -> Undo:
    if not edit.path:
        raise ModelError(f"the whole {type(model).__name__} cannot be replaced by a {edit.kind}: swap a submodule")
    old = module_at(model, edit.path)
    new = build(edit.kind, dict(edit.options))
    near = [*named_tensors(old).values(), *named_tensors(model).values()]
    if near and not any(tensor.is_meta for tensor in named_tensors(new).values()):
        new.to(near[0].device)
    if not isinstance(new, QuantizedLayer):  # its scales are float32, as the reference operators want them
        new.to(next((tensor.dtype for tensor in near if tensor.is_floating_point()), None))
    if edit.state is not None:
        try:
            new.load_state_dict(dict(edit.state), strict=True)
        except RuntimeError as error:
            raise ModelError(
                f"{edit.path}: the state does not fit a {edit.kind} with {dict(edit.options)}: {error}"
            ) from error
    if any(_channels_last(tensor) for tensor in named_tensors(old).values()):
        new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    new.train(old.training)
    holders = _holders(model, old)
    _replace(holders, new)
    return lambda: _replace(holders, old)


def _apply_write(model: nn.Module, edit: Write) -> Undo:
    if edit.state is None:
        return lambda: None
    tensors = named_tensors(model)
    for name, value in edit.state.items():
        if name not in tensors:
            raise ModelError(f"{type(model).__name__} has no tensor {name!r}.{closest(name, tensors)}")
        if tensors[name].shape != value.shape:
            raise ModelError(
                f"{name} is {list(tensors[name].shape)} and cannot take values of shape {list(value.shape)}"
            )
    old = {name: tensors[name].detach().clone() for name in edit.state}

    def write(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)

    write(edit.state)
    return lambda: write(old)


def masked_state(model: nn.Module, edit: Keep) -> dict[str, Tensor]:
    """Return the values of the cut tensors with every removed slice zeroed: what a sound cut must be equal to."""
    tensors = named_tensors(model)
    masked: dict[str, Tensor] = {}
    for cut in edit.cuts:
        value = masked.get(cut.tensor, tensors[cut.tensor].detach().clone())
        gone = torch.ones(value.shape[cut.dim], dtype=torch.bool, device=value.device)
        gone[list(cut.index)] = False
        value.transpose(0, cut.dim)[gone] = 0
        masked[cut.tensor] = value
    return masked


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Return edits as JSON-able structure: sizes for Keep, kind and options for Swap, sparse names for Write.

    A Keep's index lists become lengths, since a replayed model takes its values from a state dict.
    """
    rows: list[dict[str, Any]] = []
    for edit in edits:
        if isinstance(edit, Keep):
            rows.append(
                {"keep": [[cut.tensor, cut.dim, len(cut.index)] for cut in edit.cuts], "sizes": dict(edit.sizes)}
            )
        elif isinstance(edit, Swap):
            rows.append({"swap": edit.path, "kind": edit.kind, "options": dict(edit.options)})
        elif edit.sparse:
            rows.append({"sparse": list(edit.sparse)})
    return rows


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Edit]:
    """Return the edits that `to_json` wrote.

    Raises:
        ArtifactError: a row is not an edit.
    """
    edits: list[Edit] = []
    for row in rows:
        try:
            if "keep" in row:
                if any(int(length) > _LONGEST for *_, length in row["keep"]):
                    raise ValueError(f"it keeps more than {_LONGEST} entries of a dimension")
                cuts = tuple(Cut(str(name), int(dim), tuple(range(int(length)))) for name, dim, length in row["keep"])
                edits.append(Keep(cuts, tuple((str(path), int(size)) for path, size in row["sizes"].items())))
            elif "swap" in row:
                edits.append(Swap(str(row["swap"]), str(row["kind"]), dict(row["options"])))
            else:
                edits.append(Write(None, tuple(str(name) for name in row["sparse"])))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(f"not an edit: {str(row)[:200]} ({error})") from error
    return edits


def replay(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Apply recorded edits to a model of the original class, in place, and return it; values come from a later load.

    Raises:
        ModelError: an edit does not fit this model.
    """
    for edit in edits:
        apply(model, edit)
    return model
