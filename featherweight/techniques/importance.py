"""How much each unit of a coupled group matters: read from its weights, or from what calibration data says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import batches, forward
from featherweight.edits import module_at, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.modes import evaluating
from featherweight.technique import Context
from featherweight.techniques.gradients import gradients
from featherweight.techniques.surgeon import removal_errors

KINDS = ("l2", "l1", "batch_norm", "geometric_median", "taylor", "fisher", "obs", "activation", "random")
FROM_DATA = frozenset({"taylor", "fisher", "obs", "activation"})


def importance(
    model: nn.Module, groups: Sequence[CoupledGroup], kind: str, context: Context, count: int
) -> list[Tensor]:
    """Return the importance of each unit of each group, `[units]` float64, at least 0.

    `"taylor"` and `"fisher"` estimate a change of the loss and compare across groups as they are; all others are relative
    to the group's mean. Where a group has no batch norm, or no layer whose output is one tensor, `"batch_norm"` and
    `"activation"` fall back to `"l2"`.

    Args:
        model: comes back as it was, gradients included.
        groups: of this model.
        kind: one of `KINDS`. `"l1"`, `"l2"`: norm of all slices that leave with the unit (Li et al., 2017), each member
            relative to its mean (Fang et al., 2023). `"batch_norm"`: |gamma| (Liu et al., 2017).
            `"geometric_median"`: sum of distances to the other units (He et al., 2019). `"taylor"`: square of the sum of
            weight times gradient (Molchanov et al., 2019). `"fisher"`: sum of the squares of weight times gradient, the
            diagonal of the empirical Fisher matrix (Theis et al., 2018). `"activation"`: mean L2 norm of the output
            channel. `"obs"`: error of the layers behind after a least-squares refit (Kurtic et al., 2023); comparable
            across groups, one that no dense layer reads takes its `"l2"` at their mean. `"random"`: a baseline.
        context: data, teacher, seed and device.
        count: calibration batches to read, for the kinds in `FROM_DATA`.

    Raises:
        DataError: there is no calibration data, or it does not fit the loss.
    """
    if not groups:
        return []
    if kind not in FROM_DATA:
        return _scores(model, groups, kind, context, count)
    known = (
        kind,
        count,
        context.draw("importance"),
        *((group.members, len(group)) for group in groups),
        digest(model),
    )
    if known not in context.memory:
        context.memory[known] = _scores(model, groups, kind, context, count)
    return list(context.memory[known])


def digest(model: nn.Module) -> bytes:
    """A hash of everything a model computes with."""
    digest = hashlib.sha256()
    for tensor in named_tensors(model).values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _scores(model: nn.Module, groups: Sequence[CoupledGroup], kind: str, context: Context, count: int) -> list[Tensor]:
    if kind == "random":
        return [
            torch.rand(len(group), generator=context.rng(group.name, place), dtype=torch.float64)
            for place, group in enumerate(groups)
        ]
    tensors = named_tensors(model)
    if kind in ("taylor", "fisher"):
        return _from_gradients(model, groups, context, count, together=kind == "taylor")
    if kind == "obs":
        errors = removal_errors(model, groups, context, count)
        known = torch.cat([error for error in errors if error is not None] or [torch.ones(1)])
        return [
            _relative(_magnitudes(group, tensors, 2)) * known.mean() if error is None else error
            for group, error in zip(groups, errors, strict=True)
        ]
    found: list[Tensor | None]
    if kind == "geometric_median":
        found = [_distances(group, tensors) for group in groups]
    elif kind == "batch_norm":
        found = [_gammas(group, model) for group in groups]
    elif kind == "activation":
        found = _activations(model, groups, context, count)
    else:
        found = [None] * len(groups)
    power = 1 if kind == "l1" else 2
    scores = [
        _magnitudes(group, tensors, power) if score is None else score
        for group, score in zip(groups, found, strict=True)
    ]
    return [_relative(score) for score in scores]


def within(model: nn.Module, group: CoupledGroup, context: Context) -> bool:
    """Whether all outputs that a unit of the group takes with it are in scope; the inputs of others follow."""
    return all(map(context.in_scope, makers(model, group)))


def makers(model: nn.Module, group: CoupledGroup) -> set[str]:
    """Return the paths of the layers that make a group's units, or else of all that hold bare parameters, whose sides nobody can tell."""
    holders = {name.rpartition(".")[0] for name, _ in group.members}
    made = {name.rpartition(".")[0] for name, dim in group.members if makes(model, name, dim)}
    return made or {path for path in holders if _bare(module_at(model, path))}


def _bare(holder: nn.Module) -> bool:
    own = type(holder).__module__.startswith(("torch.nn.", "featherweight.layers."))
    return not own or isinstance(holder, nn.ParameterList | nn.ParameterDict)


def makes(model: nn.Module, name: str, dim: int) -> bool:
    """Whether dimension `dim` of a tensor is the one of its layer's outputs, and not of what the layer reads."""
    path, _, attribute = name.rpartition(".")
    layer = module_at(model, path)
    turned = isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False)
    return dim == int(turned and attribute == "weight")


def indices(group: CoupledGroup) -> list[Tensor]:
    """Return, for each member of a group, the indices that each unit owns, `[units, owned]` int64."""
    return [torch.tensor([unit[member] for unit in group.units]) for member in range(len(group.members))]


def sums(values: Tensor, dim: int) -> Tensor:
    """Return the sum of `values` over all dimensions but `dim`, `[size of dim]` float64 on the CPU."""
    return values.detach().movedim(dim, 0).flatten(1).sum(1).cpu().double() if values.dim() > 1 else _plain(values)


def _relative(score: Tensor) -> Tensor:
    return score / score.mean().clamp_min(1e-30)


def _plain(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _matrices(group: CoupledGroup, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Values, dimension and indices of the members that have a say; biases and statistics move with their channel."""
    for (name, dim), owned in zip(group.members, indices(group), strict=True):
        if tensors[name].dim() >= 2:
            yield _plain(tensors[name]), dim, owned


def _magnitudes(group: CoupledGroup, tensors: dict[str, Tensor], power: int) -> Tensor:
    total = torch.zeros(len(group), dtype=torch.float64)
    for values, dim, owned in _matrices(group, tensors):
        norms = sums(values.abs().pow(power), dim)
        total += (norms / norms.mean().clamp_min(1e-30))[owned].mean(1)
    return total.pow(1 / power)


def _distances(group: CoupledGroup, tensors: dict[str, Tensor]) -> Tensor | None:
    squares = torch.zeros(len(group), len(group), dtype=torch.float64)
    for values, dim, owned in _matrices(group, tensors):
        rows = values.movedim(dim, 0)[owned].flatten(1)
        squares += torch.cdist(rows, rows).square() / rows.square().sum(1).mean().clamp_min(1e-30)
    return squares.sqrt().sum(1)


def _gammas(group: CoupledGroup, model: nn.Module) -> Tensor | None:
    found = []
    for (name, _), owned in zip(group.members, indices(group), strict=True):
        path, _, attribute = name.rpartition(".")
        layer = module_at(model, path)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and attribute == "weight":
            found.append(_plain(layer.weight).abs()[owned].mean(1))
    return torch.stack(found).sum(0) if found else None


def _activations(model: nn.Module, groups: Sequence[CoupledGroup], context: Context, count: int) -> list[Tensor | None]:
    producers: dict[str, int] = {}
    for group in groups:
        for name, dim in group.members:
            channel = _output_channel(model, name, dim)
            if channel is not None:
                producers[name] = channel
    norms: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def watch(name: str, channel: int) -> Any:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            each = output.detach().movedim(channel, 1)
            norm = each.reshape(each.shape[0], each.shape[1], -1).norm(dim=2).sum(0)
            norms[name] = norms.get(name, 0) + _plain(norm)
            seen[name] = seen.get(name, 0) + each.shape[0]

        return module_at(model, name.rpartition(".")[0]).register_forward_hook(see)

    with ExitStack() as stack:
        for name, channel in producers.items():
            stack.callback(watch(name, channel).remove)
        stack.enter_context(evaluating(model))
        for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), count):
            forward(model, inputs)
    found: list[Tensor | None] = []
    for group in groups:
        members = zip(group.members, indices(group), strict=True)
        means = [
            (norms[name] / seen[name])[owned].mean(1)
            for (name, dim), owned in members
            if name in norms and _output_channel(model, name, dim) is not None
        ]
        scaled = [mean / mean.mean().clamp_min(1e-30) for mean in means]
        found.append(torch.stack(scaled).sum(0) if scaled else None)
    return found


def _output_channel(model: nn.Module, name: str, dim: int) -> int | None:
    """The dimension of a layer's output that dimension `dim` of its weight makes, or None where it makes none."""
    path, _, attribute = name.rpartition(".")
    layer = module_at(model, path)
    if attribute != "weight":
        return None
    if isinstance(layer, nn.modules.conv._ConvNd):
        makes = dim == (1 if layer.transposed else 0) and not (layer.transposed and layer.groups > 1)
        return -1 - len(layer.kernel_size) if makes else None
    if isinstance(layer, nn.Linear | nn.Embedding):
        return -1 if dim == int(isinstance(layer, nn.Embedding)) else None
    return None


def _from_gradients(
    model: nn.Module, groups: Sequence[CoupledGroup], context: Context, count: int, together: bool
) -> list[Tensor]:
    """Mean over batches of `(sum w g)^2` (together) or of `sum (w g)^2`, over everything that leaves with a unit."""
    totals = [torch.zeros(len(group), dtype=torch.float64) for group in groups]
    owned = [indices(group) for group in groups]
    members = {member for group in groups for member in group.members}
    read = 0
    for products in _products(model, {name for name, _ in members}, context, count):
        read += 1
        values = products if together else {name: product.square() for name, product in products.items()}
        each = {(name, dim): sums(values[name], dim) for name, dim in members if name in values}
        for total, group, places in zip(totals, groups, owned, strict=True):
            change = torch.zeros_like(total)
            for member, place in zip(group.members, places, strict=True):
                if member in each:
                    change += each[member][place].sum(1)
            total += change.square() if together else change
    return [total / read for total in totals]


def _products(model: nn.Module, names: set[str], context: Context, count: int) -> Iterator[dict[str, Tensor]]:
    """Weight times gradient of the loss by name, for each calibration batch."""
    weights = {name: p for name, p in model.named_parameters() if name in names and p.is_floating_point()}
    for found in gradients(model, weights, context, count):
        yield {name: weights[name].detach() * gradient for name, gradient in found.items()}
