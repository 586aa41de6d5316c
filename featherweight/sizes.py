"""Which integer attributes of a model follow from a cut: `out_channels`, `hidden_size`, and the user's own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice

from torch import nn

from featherweight.edits import Cut, Keep, module_at, named_tensors

_TRIES = 64  # sets of attributes tried for one cut; each costs a forward


def following_sizes(model: nn.Module, cuts: Sequence[Cut]) -> list[tuple[str, int]]:
    """Return `(dotted path, value)` of the integer attributes of `torch.nn` layers that follow from cut shapes."""
    tensors, shapes = named_tensors(model), dict[str, list[int]]()
    for cut in cuts:
        shape = shapes.setdefault(cut.tensor, list(tensors[cut.tensor].shape))
        shape[cut.dim] = len(cut.index)
    sizes: dict[str, int] = {}
    for tensor, shape in shapes.items():
        path, _, attribute = tensor.rpartition(".")
        sizes |= {f"{path}.{name}": size for name, size in _of_layer(module_at(model, path), attribute, shape).items()}
    return sorted(sizes.items())


def _of_layer(layer: nn.Module, attribute: str, shape: list[int]) -> dict[str, int]:
    """The sizes of one layer when its tensor `attribute` takes this shape."""
    if isinstance(layer, nn.modules.conv._ConvNd) and attribute == "weight":
        first, second = (1, 0) if layer.transposed else (0, 1)
        depthwise = layer.groups > 1 and layer.in_channels == layer.groups
        groups = layer.groups * shape[0] // layer.weight.shape[0] if depthwise else layer.groups
        outside, inside = (groups, 1) if layer.transposed else (1, groups)
        return {"groups": groups, "out_channels": shape[first] * outside, "in_channels": shape[second] * inside}
    if isinstance(layer, nn.Linear) and attribute == "weight":
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(layer, nn.modules.batchnorm._NormBase) and attribute in ("weight", "running_mean"):
        return {"num_features": shape[0]}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and attribute == "weight":
        return {f"normalized_shape.{dim}": size for dim, size in enumerate(shape)}
    if isinstance(layer, nn.GroupNorm) and attribute == "weight":
        alone = layer.num_groups == layer.num_channels
        return {"num_channels": shape[0]} | ({"num_groups": shape[0]} if alone else {})
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": shape[1]}
    if isinstance(layer, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(layer, nn.RNNBase):
        if attribute == "weight_ih_l0":
            gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
            return {"input_size": shape[1], "hidden_size": shape[0] // gates}
        if attribute == "weight_hr_l0":
            return {"proj_size": shape[0]}
    return {}


def alternatives(model: nn.Module, edit: Keep) -> Iterator[Keep]:
    """Yield the cut with integer attributes of the user's own modules set along, the likeliest first.

    A forward that reads `self.heads` or `self.hidden_dim` fits a cut only when the attribute shrinks in proportion. Which
    attributes mean the size that is cut cannot be known; the caller tries each and keeps what computes the right output.

    Args:
        model: not yet cut.
        edit: the cut, with the sizes of `following_sizes`.
    """
    tensors = named_tensors(model)
    changes = Counter((tensors[cut.tensor].shape[cut.dim], len(cut.index)) for cut in edit.cuts)
    owners = {path for cut in edit.cuts for path in _parents(cut.tensor)}
    meant: dict[tuple[type, str], list[tuple[str, int]]] = defaultdict(list)
    exact: Counter[tuple[type, str]] = Counter()
    for path in sorted(owners):
        module = module_at(model, path)
        if type(module).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(module).items():
            new = _shrunk(value, changes) if type(value) is int and value > 1 else None
            if new is not None:
                meant[type(module), name].append((f"{path}.{name}".lstrip("."), new))
                exact[type(module), name] += any(old == value for old, _ in changes)
    ranked = sorted(meant, key=lambda key: (-exact[key], key[1]))
    choices = (some for count in range(1, len(ranked) + 1) for some in combinations(ranked, count))
    for some in islice(choices, _TRIES):
        yield replace(edit, sizes=edit.sizes + tuple(size for key in some for size in meant[key]))


def _shrunk(value: int, changes: Counter[tuple[int, int]]) -> int | None:
    """What an attribute becomes that means a size that is cut, or divides one that is; None when it fits none."""
    ranked = [change for change, _ in changes.most_common()]
    fitting = [(old, new) for old, new in ranked if old == value]
    fitting += [(old, new) for old, new in ranked if 0 < new < old and old % value == 0 and value * new % old == 0]
    return value * fitting[0][1] // fitting[0][0] if fitting else None


def _parents(tensor: str) -> list[str]:
    """Return the paths of all modules that hold a tensor, the root's empty one too."""
    parts = tensor.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]
